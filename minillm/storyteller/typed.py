"""What people type first: openings of a story in every form, and requests that the storyteller cannot fulfil.

`opening` expands a small grammar into the first sentence or two of a story. A mark, CUT, says where the typed part ends:
the training text reads what stands before it and learns what stands after it. `unknown` draws a request outside of what
the storyteller knows, with its honest answer. The words of `odd_words` stand for all that people may type; they are read
and never learned, because CUT always comes after the last of them.

A name in square brackets is expanded from GRAMMAR or stands for an odd word (ODD), with a capital letter when the name has
one; the fields in braces are those of `vocabulary`, {him} of the hero and {called}, a title before a name. "a~" is "a" or "an".
"""

# ruff: noqa: E501, SIM905 -- a sentence stays on one line, and a list of words is one text

import random
import re

from minillm.storyteller import odd_words
from minillm.storyteller import vocabulary as words

CUT = "¦"  # stands in no word of the corpus

OTHER_HEROES = {  # heroes that only an opening brings, by pronoun; "" is an animal's name and pronoun
    "she": "girl woman princess queen witch fairy mermaid teacher mother grandmother".split(),
    "he": "boy man king prince farmer wizard giant knight pirate sailor father grandfather".split(),
    "": "dragon cow pig horse wolf lion bird bee sheep snake monkey elephant tiger monster ghost unicorn fish puppy "
    "kitten spider whale star tree cloud".split(),
}  # fmt: skip

ODD = {  # what stands for an odd word in the grammar: the part of speech
    "odd": "odd", "n": "n", "ns": "ns", "v": "v", "vt": "vt", "b": "b", "a": "a", "adv": "adv", "person": "kind", "timeof": "time", "land": "land",
}  # fmt: skip

GRAMMAR = {
    "start": (
        # words of the corpus alone: the typed part may end anywhere
        *("[np] [did]. [named]",) * 5, *("[np] named {hero} [did].",) * 2, "[np] called {hero} [did].",
        "[np], whose name was {hero}, [did].", "[np] and {friend} [both]. [named]", "[np] [was]. [named]",
        *("[when] [np] [did]. [named]",) * 4, *("[when] [np] named {hero} [did].",) * 2, "[when] [np] and {friend} [both]. [named]",
        *("[there] a~ [kind] named {hero}.",) * 3, *("[there] a~ [kind] named {hero} who [did].",) * 2,
        "[there] a~ [kind] called {hero}.", "[there] a~ [kind] who [did]. [named]", "[there] a~ [kind]. [named]",
        *("{hero} [did].",) * 3, *("{hero} was a~ [kind] who [did].",) * 2, "{hero} was a~ [kind].", "{hero} [was].", "{hero}, a~ [kind], [did].",
        *("[when] {hero} [did].",) * 3, "{hero} and {friend} [both].", "{hero} and {friend} [both].", "[when] {hero} and {friend} [both].",
        "It was [weather]. [Np] named {hero} [did].", "It was [weather]. {hero} [did].", "It was [weather], and {hero} [was].",
        "It was [weather] when a~ [kind] named {hero} [did].", "It was [weather] at the {place}. {hero} [did].",
        "It was a~ [kind] named {hero} who [did].", "It was {hero} who [did].",
        *("[where] lived a~ [kind] named {hero}.",) * 2, "[where], there lived a~ [kind] named {hero}.", "[where] there was a~ [kind] named {hero}.",
        "[where], there was a~ [kind] named {hero}.", "[where], a~ [kind] named {hero} [did].", "[where], {hero} [did].",
        "[where] was a~ [kind]. [named]", "[when] [where], there lived a~ [kind] named {hero}.",
        "\"[say]\" said {hero}. {hero} was a~ [kind].", "\"[say]\" said the [kind]. [named]", "\"[say]\" said a~ [kind] named {hero}.",
        "\"[say]\" said {hero} to {friend}.", "\"[ask]\" asked {hero}.", "\"[ask]\" asked the [kind]. [named]", "{hero} said, \"[speech]\"", "[np] said, \"[speech]\" [named]",
        "[sky]. [Np] named {hero} [did].", "[sky]. {hero} [did].", "[sky], and {hero} [did].", "[sky], and a~ [kind] named {hero} [did].",
        "[i] a~ [kind] named {hero}.", "[i] a~ [kind] named {hero} who [did].", "[i] a~ [kind]. [named]", "my {kind} is called {hero}.",
        "[title] a~ [kind] named {hero} who [did].", "[title] {hero}, a~ [kind].", "[title] {hero} and {friend}. {hero} was a~ [kind].",
        "{He} [did]. [named]", "{He} [was]. [named]", "{He} was a~ [kind] named {hero}.", "[when] {he} [did]. [named]",
        "they [both]. [one]", "[some] [both]. [one]", "[some] [both]. [one]", "two friends, {hero} and {friend}, [both].", "there were [some]. [one]",
        "[the] {colour} {obj} [lay]. It belonged to a~ [kind] named {hero}.", "[the] {colour} {obj} [lay]. {hero} wanted it.",
        "[the] {place} was quiet. {hero} [did].", "[the] {place} was beautiful. A~ [kind] named {hero} [did].",
        "when {hero} [did], the sun was out.", "when [np] [did], it was cold. [named]", "when the sun was out, {hero} [did].",
        "{hero} [did] [more].", "[np] [did] [more]. [named]", "[where], [np] [did]. [named]", "there is a~ [kind] named {hero} at the {place}.",
        "I am a~ [kind] named {hero}, and this is my story.", "my name is {hero}, and this is my story. I was a~ [kind] who [did].",
        "if you go to the {place}, you will see a~ [kind] named {hero}.", "we went to the {place} and saw a~ [kind] named {hero}.",
        # somebody, with odd words: they are read, and the story goes on
        *("[np] [which] [did]. [named]",) * 8, *("the [a] {kind} [did]. [named]",) * 3, "a~ [a], [a] {kind} [did]. [named]", "the [most] {kind} [which] [did]. [named]",
        *("[np] [does]. [named]",) * 6, *("[np] [does] [more]. [named]",) * 3, *("[np] [which] [does]. [named]",) * 2, *("[when] [np] [does]. [named]",) * 3, "[np] [does], but {he} [was]. [named]",
        "[np] [does] because {he} [was]. [named]", "[np] [does] and [did]. [named]", "[np] [v] when {hero} [did].", "[np], the [a] {kind}, [did]. [named]",
        *("[np] and the [whom] [both]. [one]",) * 4, "[np] and {his} [whom] [both]. [one]", "[np] and a~ [whom] [both]. [one]", "the [whom] and the [whom] [both]. [one]", "the [whom] and the [whom] [more2]. [one]",
        *("[num] [ns] [both]. [one]",) * 3, "[num] [a] [ns] [both]. [one]", "[num] [ns] and their [n] [both]. [one]", "the [ns] [both]. [one]", "the [a] [ns] [which] [both]. [one]",
        "[some] and a~ [whom] [both]. [one]", "the [n]'s {kind} [did]. [named]", "my [n]'s {kind} [did]. [named]", "my [a] {kind} [did]. [named]", "our {kind} [does]. [named]", *("the [n] {kind} [did]. [named]",) * 3, "a~ [n] {kind} [did]. [named]", "[time], the [n] {kind} [did]. [named]", "[when] a~ [n] {kind} [did]. [named]",
        "the [n] [lay]. {hero} [did].", "the [n] was [a]. {hero} [did].", "my [n] [v]. {hero} [did].", "the [a] [n] [v] [where2], and {hero} [did].", "the [ns] [v]. {hero} [did].", "[ns] [v] [where2], and {hero} [did].",
        "the [ns] were [a], and {hero} [did].", "all the [ns] in the [n] [v]. {hero} [did].", "every [n] [v]. {hero} [did].",
        # a name
        *("{hero} [does].",) * 8, *("{hero} [does] [more].",) * 4, *("[when] {hero} [does].",) * 3, *("{hero} [does] and [did].",) * 2, *("{hero} [does], but {he} [did].",) * 2, *("{hero} [does] because {he} [was].",) * 2,
        "{hero} [does] until {he} [did].", "{hero} [does] when {friend} [did].", "{hero} [does] so {he} [did].", "{hero} [v] that {he} [was].", "{hero} [v] how {friend} [did].",
        *("{hero} and {his} [whom] [both].",) * 4, "{hero} and {his} [a] [whom] [both].", "{hero} and the [whom] [both].", "{hero} and the [a] [whom] [both].", "[when] {hero} and {his} [whom] [both].", "{hero} and {friend} [does2].",
        *("{hero}, the [most] [n] [of], [did].",) * 2, "{hero}, the [a] [whom], [did].", "{hero}, who [does], [did].", "{hero} [which] [did].", "{hero}'s [n] was [a]. {hero} [did].", "{hero}'s [n] [lay]. {hero} [did].",
        *("[called] {hero} [does].",) * 4, *("[called] {hero} [was].",) * 2, *("[called] {hero} [did].",) * 2, "[called] {hero} [does] [more].", "[called] {hero} and {friend} [both].", "{hero} was [a].", "{hero} was [a] and [a].",
        "{hero} was the [most] [n] in the [n].", "{hero} was a~ [a] {kind} who [did].", "{hero} had a~ [a] [n] and [did].", "{hero} loved [ns] and [did].", "poor {hero} [does].",
        "{hero} lived [prep] a~ [n] and [did].", "{hero} lived with {his} [whom] [where2].",
        "{He} was the [most] [n] [of]. [named]", "{He} was [a]. [named]", "{He} [does]. [named]", "{He} [does] [more]. [named]", "{His} [n] was [a]. [named]", "{He} had [adv] [v] a~ [n]. [named]",
        # when and where
        *("[time], {hero} [did].",) * 5, *("[time], [np] [did]. [named]",) * 5, *("[time], [np] [does]. [named]",) * 3, *("[time], {hero} [does].",) * 3, "[time], a~ [kind] named {hero} [did].", "[time], there lived a~ [kind] named {hero}.",
        *("[time], the [ns] [both]. [one]",) * 2, "[time], the [a] [n] [lay]. {hero} [did].", "[time] there was a~ [kind] named {hero}.", "[time], all the [ns] [both]. [one]", "[time], the [n] [v]. {hero} [did].", "[time] we [v] to the [n] and saw a~ [kind] named {hero}.",
        "[time], everybody [v]. {hero} [did].", "[time], [where2], {hero} [did].", "[time], I saw a~ [kind] named {hero}.", "[time], we went to the [n] and saw a~ [kind] named {hero}.", "[time], we saw a~ [kind] named {hero}.", "[time] a~ [kind] named {hero} [does].",
        *("[place2], there lived a~ [kind] named {hero}.",) * 4, *("[place2] there was a~ [kind] named {hero}.",) * 2, *("[place2] lived a~ [kind] named {hero}.",) * 3, *("[place2], a~ [kind] named {hero} [did].",) * 3, *("[place2], {hero} [did].",) * 2,
        *("[place2], [np] [did]. [named]",) * 3, "[place2], [np] [does]. [named]", "[place2], {hero} [does].", "[place2], the [ns] [both]. [one]", "[place2] was a~ [kind] named {hero}.", "[place2], there was a~ [n]. {hero} [did].", "[place2], [time], {hero} [did].",
        "[place2] was a~ [n], and {hero} lived there.", "[place2] there was a~ [a] [n], and a~ [kind] named {hero} [did].", "[place2] lives a~ [kind] named {hero}.", "my [n] lives a~ [kind] named {hero}.",
        *("[place2], where the [n] [v], {hero} [did].",) * 2, "[place2], where the [ns] [v], there lived a~ [kind] named {hero}.", "[time], when the [ns] could [b], {hero} [did].", *("[time], when [clause2], {hero} [did].",) * 2, "[time], when [clause2], there lived a~ [kind] named {hero}.", "[time], when [clause2], [np] [did]. [named]",
        *("on {his} [whither] {hero} [did].",) * 2, *("[clause] [clause2], {hero} [did].",) * 4, *("[clause] [clause2], [np] [did]. [named]",) * 3, "[clause] [clause2], a~ [kind] named {hero} [did].",
        "[clause] [np] [does], it was cold. [named]", "[clause] {hero} [v], {he} [did].", "[clause] {hero} was [a], {he} [did].",
        # there was, it was
        *("there was a~ [n], and {hero} [did].",) * 2, *("there was a~ [n] [where2], and a~ [kind] named {hero} [did].",) * 2, "there was a~ [a] [n]. {hero} [did].", "there was a~ [a] [n] [where2]. {hero} [did].", "there was no [n], so {hero} [did].",
        "there was no [n] [where2]. {hero} [did].", "there were [num] [ns]. {hero} [did].", "there were no [ns] [where2]. {hero} [did].", "there were no [adv] [ns], so {hero} [did].", "there were [ns] [where2], and {hero} [did].", "there was [adv] a~ [kind] named {hero}.",
        "there [adv] was a~ [kind] who [did]. [named]", "there was [n] [where2]. {hero} [did].", "there came a~ [n], and {hero} [did].", "there was only one [n] [where2]. {hero} [did].", "there were [ns] and [ns]. {hero} [did].", *("[there] a~ {kind} who [does]. [named]",) * 3,
        *("it was the [most] [n] [of]. {hero} [did].",) * 3, *("it was the [most] [n] [of], and a~ [kind] named {hero} [did].",) * 2, *("it was [a], and {hero} [did].",) * 2, "it was [a]. {hero} [did].", "it was so [a] that {hero} [did].", *("it was [a] when {hero} [did].",) * 2, "it was [v] when a~ [kind] named {hero} [did].",
        *("it was [timeword]. {hero} [did].",) * 2, *("it was [timeword], and {hero} [did].",) * 2, "it was a~ [a] [timeword]. {hero} [did].", "it was [n] when {hero} [did].", "it was a~ [n]. {hero} [did].", "it was [adv] [a] when {hero} [did].", "it had [v] all [timeword], and {hero} [did].",
        *("it [v] when {hero} [did].",) * 2, "it all [v] when a~ [kind] named {hero} [did].", *("it [v] [adv] when a~ [kind] named {hero} [did].",) * 2, "it [v], and {hero} [did].", "it was [v] that {hero} [did].", "it [v] like a~ [n], but {hero} [did].", "this is how {hero} [did].", "it was not a~ [n] but a~ [kind] named {hero}.",
        # somebody speaks
        *("[knew] [conj] {hero} [did].",) * 5, *("[knew] [conj] the {kind} [did]. [named]",) * 3, *("[knew] [conj] a~ [kind] named {hero} [did].",) * 3, "[knew] [conj] {he} [did]. [named]", *("[knew] what {hero} found {spot}.",) * 3, "[knew] what the {kind} saw. [named]", "[knew] who {hero} was.", "[knew] where {hero} lived.",
        *("[everyone] [v] when {hero} [did].",) * 2, *("[everyone] [v] when the {kind} [did]. [named]",) * 3, "[everyone] [v] when a~ [kind] named {hero} [did].", "[everyone] [v] because {hero} [did].", "[everyone] [v] {hero}, a~ [kind].", "[everyone] [v] the [n], but {hero} [did].", "[everyone] [v], but {hero} [did].",
        "[everyone] [v]. {hero} [did].", "[everyone] in the [n] [v] {hero}.", "[everyone] was [a], and {hero} [did].", *("I [have] to see a~ [kind] named {hero}.",) * 3, "I was [a] to see a~ [kind] named {hero}.", "I am [adv] [a] to meet a~ [kind] named {hero}.", "I would [adv] like to see a~ [kind] named {hero}.", "I [v] [where2] to see a~ [kind] named {hero}.", *("I [have] a~ [kind] named {hero}.",) * 3, "I [have] to [b] a~ [kind] named {hero}.", "I [have] the {kind}. [named]", "we [have] to see a~ [kind] named {hero}.",
        "we [have] a~ [kind] named {hero}.", "I [v] the [n], and {hero} [did].", "we [v] to the [n], and a~ [kind] named {hero} [did].", "I am [a], and {hero} is my friend.", "my [n] is [a], and {hero} is my friend.", "I [b] [ns], and {hero} [did].",
        *("if I were a~ [n], I would see a~ [kind] named {hero}.",) * 2, "if I [v] a~ [n], I would see a~ [kind] named {hero}.", "if you [b] the [n], you will see a~ [kind] named {hero}.", "if I could [b], I would see a~ [kind] named {hero}.", *("when I was [a], I had a~ [kind] named {hero}.",) * 2, *("when I was a~ [n], there lived a~ [kind] named {hero}.",) * 2,
        "when I [v], I saw a~ [kind] named {hero}.", "when we were [a], we had a~ [kind] named {hero}.", "what would you [b] if a~ [kind] named {hero} [did]?", "do you [b] that {hero} [did]?", *("have you [adv] [v] a~ [kind] named {hero}?",) * 2, "have you ever [v] of the {kind}? [named]", "have you ever [v] the [n]? {hero} [did].", "have you [v] of {hero}? {hero} [did].", "do you [b] {hero}, the [a] {kind}?", *("[time] I [v] a~ {kind}. [named]",) * 2, "[time] my {kind} [does]. [named]", "[time] the [n] [v], and {hero} [did].", "we were [a]. {hero} [did].", "we were [a], and {hero} [did].", "they were [a]. {hero} [did].", "I was [a]. {hero} [did].",
        "I am a~ [n], and this is my story. I had a~ [kind] named {hero}.", "I am the [n] of a~ [kind] named {hero}.", "[whom] said, \"[cry]\" {hero} [did].", "my [whom] said, \"[cry]\" {hero} [did].", "mum said, \"[cry]\" {hero} [did].", "what if a~ [kind] named {hero} [did]?",
        *("\"[cry]\" [v] the {kind}. [named]",) * 4, *("\"[cry]\" [v] {hero}.",) * 2, *("\"[cry]\" said the {kind}. [named]",) * 2, "\"[cry]\" said {hero}.", "\"[cry]\" {he} [v]. [named]", *("\"[cry]\" asked the {kind}. [named]",) * 2, "\"[cry]\" asked {hero}.", "\"[cry]\" [v] {hero}'s [whom]. {hero} [did].", "{hero} [v], \"[speech]\"", "the {kind} [v], \"[speech]\" [named]",
        # words that mean nothing
        "[odd] [odd] [odd]. [Np] named {hero} [did].", "[odd] [odd] [odd] [odd]. {hero} [did].", "[odd] [odd] [clause] {hero} [did].", "[odd] [odd], a~ [kind] named {hero} [did].", "[odd] [clause] a~ [kind] named {hero} [did].", "[odd] [odd], the [kind] [did]. [named]",
        "{hero} [odd] [odd] [more].", "[np] [odd] [odd] [more]. [named]", "the [odd] [odd] [lay]. {hero} [did].",
    ),
    "one": ("One friend's name was {hero}.", "One friend's name was {hero}.", "One of them was called {hero}."),
    "most": ("last", "first", "only", "best", "biggest", "oldest", "smallest", "youngest", "[a]", "[a]est", "most [a]"),
    "of": ("of all", "of all", "in the [n]", "in the world", "of the [timeword]", "on earth", "in [land]", "of the [n]", "[where2]"),
    "whom": ("[person]", "[person]", "[a] [person]", "[n]", "[a] [n]"),
    "which": ("on [n]", "in [n]", "in the [n]", "in the [a] [n]", "with the [a] [n]", "with the [n]", "with a~ [n]", "with [num] [ns]", "with [a] [ns]", "from the [n]", "from [land]", "of the [n]", "of the [a] [n]", "of [n]", "on the [n]", "near the [n]", "under the [n]",
              "next to the [n]", "across the [n]", "upstairs", "outside", "of the {place}", "of the {place}", "at the {place}", "in the {place}", "without a~ [n]", "without [ns]", "made of [ns]", "made of [n]", "full of [ns]", "as big as a~ [n]", "who could [b]", "who could not [b]", "who could not [b]", "who loved [ns]", "who loved to [b]", "who [does]", "who [does]",
              "who wanted to [b]", "who was [a]", "who was [adv] [a]", "who never [v]", "who [adv] [v]", "that [does]", "that could [b]", "who lived in the [n]", "who lived in a~ [a] [n]", "who had no [n]", "who had a~ [a] [n]", "who had lost {his} [n]", "who [v] to [b]", "behind the [n]", "down the [n]"),
    "does": ("[v]", "[v]", "[vt] the [n]", "[vt] the [n]", "[vt] a~ [n]", "[vt] a~ [a] [n]", "[vt] {his} [n]", "[vt] {his} [a] [n]", "[vt] [ns]", "[vt] the [a] [n]", "[v] to [b]", "[v] to [b] the [n]", "[v] [prep] the [n]", "[v] into the [n]", "[v] [prep] {his} [n]", "[v] [prep] a~ [n]", "[adv] [v]", "[v] [adv]",
             "[adv] [vt] the [n]", "[v] about the [n]", "[v] for [ns]", "[v] in the [n]", "wanted to [b]", "wanted to [b] the [n]", "wanted a~ [n]", "was [a]", "was very [a]", "was [adv] [a]", "was [a] and [a]", "was so [a] that {he} could not sleep", "was [prep] the [n]", "was [v] by a~ [n]", "was a~ [a] [n]",
             "had a~ [a] [n]", "had [num] [ns]", "had no [n]", "had never [v] a~ [n]", "had to [b]", "had to go home", "had lost {his} [n]", "could not [b]", "could not [b] the [n]", "could not find {his} [n]", "could [b]", "did not [b]", "did not [b] the [n]", "did not want to [b]", "would not [b]", "never [v]", "never [vt] the [n]",
             "began to [b]", "tried to [base]", "[v] to [base]", "[v] to [base]", "[v] to [base]", "[v] {he} could [base]", "wished {he} had a~ [n]", "[v] that the [n] was [a]", "[v] all [timeword]", "[v] every [timeword]", "lived in a~ [n]", "liked [ns]", "loved [ns]", "loved [n]", "loved {his} [n]",
             "went to the [n]", "went to [b]", "looked at the [a] [n]", "saw a~ [a] [n]", "found a~ [n]", "found a~ [n] [prep] the [n]", "heard a~ [n]", "heard a~ [a] [n]", "felt [a]", "was afraid of the [n]", "came to [b]", "came [prep] the [n]", "got a~ [n]", "made a~ [n]", "ate the [n]", "ate a~ [a] [n]", "woke up [adv]", "woke up and [vt] the [n]"),
    "does2": ("[v] the [n]", "[v] [adv]", "[v] a~ [n] [where2]", "were [a]", "[v] together", "[v] to the [n]", "[v] [prep] the [n]", "loved [ns]", "wanted to [b]", "had a~ [n]"),
    "more2": ("were good friends", "[v]", "[v] [adv]", "lived [where2]", "went to the {place}"),
    "base": ("go to the {place}", "go to the {place}", "play", "sing", "find a {colour} {obj}", "go home", "see the {place}", "sleep", "look for a {colour} {obj}", "run away", "make a {colour} {obj}", "help {friend}", "play with {friend}", "walk to the {place}", "sing a song", "be brave", "take a walk", "have a {colour} {obj}", "visit {friend}"),
    "cry": ("[b] the [n]!", "[b]!", "[b], [b]!", "[v]!", "Where is the [n]?", "Where is my [n]?", "Why are you so [a]?", "Why are you [adv] [a]?", "I am [a]!", "I am not [a],", "Look, a~ [n]!", "I do not [b] to [b],", "I do not [b] [ns],", "I want to [b] the [n],", "I want a~ [n],", "Do not [b] the [n]!", "Do not [b]!", "What a~ [a] [n]!",
            "Who [v] my [n]?", "Can you [b]?", "You are [a],", "Let us [b]!", "[adv]!", "[odd]!", "[odd] [odd] [odd],", "[odd]?", "Please [b] me,", "Please [b],", "Help me [b]!", "This is my [n],", "It is [a],", "What is [odd]?", "My [n] is [a],", "Why [odd] [odd] [odd]?", "I can [b]!", "I will [b] you,", "Good [n],", "Are you a~ [n]?", "May I [b]?"),
    "knew": ("nobody [v]", "nobody could [b]", "no one [v]", "you will [adv] [b]", "you will not [b]", "you may not [b]", "everyone [v]", "everybody knew", "everyone in the [n] [v]", "people [b]", "people in the [n] [b]", "they [b]", "my [whom] [v] me", "my [whom] always [v]", "my [n] [v]", "I [b]", "I never [v]", "I [v]", "I [adv] [b]", "do you [b]", "let me [b] you", "I will [b] you", "the [n] [v] me", "one [timeword] I [v]", "we all [v]", "the [ns] [v]", "have you [v]", "did you [b]", "it is [a]", "it was [a]", "the [a] [n] was", "some [ns] [b]", "the [whom] did not [b]", "not even the [whom] [v]", "never [b]", "who would have [v]", "I still [b]", "[time], I [v]"),
    "conj": ("that", "that", "that", "why", "how", "when", "where"),
    "everyone": ("everyone", "everybody", "nobody", "no one", "the whole [n]", "all the [ns]", "the [ns]", "the other [ns]", "people", "my [whom]", "the [whom]", "they all", "we"),
    "have": ("have [adv] [v]", "have [v]", "had [adv] [v]", "[adv] [v]", "[v]", "will [adv] [b]", "never [v]", "once [v]", "[b]", "[adv] [b]", "had to [b]", "want", "[v] and [v]"),
    "called": ("{called}" + CUT,),
    "num": ("two", "three", "four", "five", "six", "seven", "ten", "a hundred", "many", "some", "several", "a few", "both", "all the"),
    "time": ("one [a] [timeword]", "one [a] [timeword]", "one [timeword]", "last [timeword]", "every [timeword]", "each [timeword]", "at [timeword]", "in [timeword]", "on [timeword]", "this [timeword]", "late one [timeword]", "early one [a] [timeword]", "on a~ [a] [timeword]", "on the [most] [timeword] of [timeword]", "in the [a] [timeword]",
             "after [timeword]", "before [timeword]", "during the [n]", "during [timeword]", "all [timeword]", "next [timeword]", "in the year [number]", "in [number]", "at [number] [timeword]", "[number] [ns] ago", "[num] [ns] ago", "[num] [ns] later", "a long, long time ago", "many [ns] ago", "for [num] [ns]", "[adv]", "[adv]", "once", "today",
             "before anybody was [a]", "before the [n] [v]", "after the [n]", "after the [n] [v]", "as soon as the [n] [v]", "while the [ns] [v]", "while everybody [v]", "when the [n] [v]", "when [timeword] came", "just before [timeword]", "the [timeword] after [timeword]", "one [timeword] in [timeword]", "on {his} [a] [timeword]", "the [a] [timeword]"),
    "timeword": ("[timeof]",),
    "place2": ("[prep] the [n]", "[prep] the [n]", "[prep] the [a] [n]", "[prep] the [a] [n]", "[prep] the [most] [n]", "[prep] the [n] of the [n]", "[prep] a~ [n] by the [n]", "[prep] a~ [a] [n]", "[prep] a~ [n]", "in [land]", "in [land]", "far away in [land]", "far [prep] the [n]", "deep [prep] the [n]", "high [prep] the [n]", "somewhere [prep] the [n]",
               "[prep] my [n]", "[prep] our [n]", "[prep] the [ns]", "[prep] [ns] and [ns]", "[prep] the [n] [prep] the [n]", "on top of the [n]", "on top of the [most] [n]", "at the end of the [n]", "at the bottom of the [n]", "in the middle of the [n]", "outside", "upstairs", "[prep] [land]", "not far from [land]", "[prep] a~ [a] [n] [prep] the [n]"),
    "where2": ("[prep] the [n]", "[prep] the [a] [n]", "[prep] a~ [n]", "in [land]", "[prep] the {place}", "everywhere", "upstairs", "outside", "at home", "[prep] my [n]"),
    "whither": ("way to the [n],", "way to [n],", "way home,", "way [prep] the [n],", "[a] [n],", "[timeword],", "first day at [n],", "own,"),
    "clause2": ("the [n] [v]", "the [n] was [a]", "the [ns] [v]", "my [whom] [v]", "the [n] had [v]", "nobody [v]", "everyone [v]", "everybody was [a]", "it [v]", "it was [a]", "they [v] the [n]", "I [v] the [n]", "we [v]", "the [a] [n] [v]", "there was no [n]", "there were no [ns]", "you [b] the [n]", "[ns] could [b]"),
    "prep": ("in", "in", "on", "on", "at", "near", "from", "behind", "under", "by", "across", "beyond", "over", "inside", "above", "below", "through", "along", "between", "past", "beside", "among", "around", "outside", "of", "with", "without"),
    "clause": ("when", "when", "because", "that", "and", "but", "how", "why", "where", "if", "so", "until", "before", "after", "while"),
    "more": (*("and [did]",) * 6, "because {he} was hungry", "because {he} was alone", "because {he} wanted to play", "with {friend}", "with {his} friend {friend}",
             "when the sun came up", "to find a {colour} {obj}", "to the {place}", "in the {place}", "at the {place}", "near the {place}", "from the {place}",
             "into the {place}", "by the {place}", "of the {place}", "so {he} went home", "that {he} could not sleep", "for {friend}", "before {he} went home",
             "until it was dark", "a {colour} {obj}", "the {obj}", "for a {colour} {obj}", "about {friend}", "who lived near the {place}", "on the way home"),
    "np": (*("the [kind]",) * 5, *("a~ [kind]",) * 4, "one [kind]", "my [kind]", "our [kind]", "this [kind]"),
    "kind": ("{kind}", "{kind}", "{adj} {kind}", "{adj} {kind}", "{adj} {kind}", "[size] {kind}", "[size] {kind}", "[size] {adj} {kind}"),
    "size": ("small", "big", "old", "tiny", "tall", "brave", "happy", "sad", "hungry", "tired", "lonely", "beautiful", "funny",
             "poor", "rich", "good", "bad", "red", "white", "black", "brown", "lazy", "slow", "fast", "friendly", "strange", "wise"),
    "the": ("the", "the", "a~", "one", "my"),
    "named": (*("{His} name was {hero}.",) * 3, "The {kind} was called {hero}.", "Everybody called {him} {hero}."),
    "did": (
        "lived near the {place}", "lived near the {place}", "lived in a small house", "lived at the {place}", "lived alone", "went to the {place}",
        "went to the {place}", "walked to the {place}", "ran to the {place}", "came to the {place}", "went home", "went out to play", "sat {spot}",
        "slept {spot}", "woke up early", "woke up", "looked at the sky", "looked out of the window", "looked {spot}", "wanted to play",
        "wanted to see the {place}", "wanted a friend", "liked to sing", "liked to play at the {place}", "loved the {place}", "loved to play",
        "played at the {place}", "could not sleep", "could sing", "heard a song", "heard something {spot}", "saw a bird in the sky", "saw {friend}",
        "met {friend}", "met {friend} at the {place}", "danced in the sun", "smiled", "laughed", "had a good friend", "had a {colour} {obj}",
        "found a {colour} {obj}", "found a {colour} {obj} {spot}", "was hungry", "was at the {place}", "was {feeling}", "began to sing",
        "said hello to {friend}", "asked {friend} to play", "took a {colour} {obj}", "ate an apple", "knew many stories",
    ),
    "was": ("was {feeling}", "was very {feeling}", "was sad", "was hungry", "was tired", "was afraid", "was afraid of the dark", "was alone",
            "was at the {place}", "was very small", "was very old", "felt sad", "felt {feeling}", "felt happy", "was in the {place}", "was so tired"),
    "both": ("were good friends", "were the best of friends", "lived near the {place}", "lived in a small house", "went to the {place}",
             "walked to the {place}", "ran to the {place}", "played at the {place}", "wanted to play", "were at the {place}", "sat {spot}",
             "were happy", "sang a song", "met at the {place}", "looked at the sky", "found a {colour} {obj}"),
    "when": ("one day,", "one day,", "one day,", "one day", "one morning,", "one evening,", "one night,", "in the morning,", "in the evening,", "in summer,",
             "in winter,", "yesterday,", "last night,", "early in the morning,", "every day,", "every morning,", "long ago,", "once,", "once upon a time,",
             "today,", "on a sunny day,", "on a cold night,", "a long time ago,", "then", "suddenly,", "after school,", "after the rain,", "at night,",
             "when the sun came up,", "when it was dark,", "one sunny morning,", "on {his} birthday,", "for many years,", "on [odd],", "during the [odd],", "after the [odd],", "before the [odd],", "at last,", "the next day,", "many years ago,"),
    "there": (*("there was", "there lived", "once there was", "once there lived", "once upon a time there lived", "once upon a time there was",
              "once upon a time, there lived", "long ago, there was", "long ago there lived", "there once lived", "far away lived", "once upon a time,"
              " long ago, there lived", "in the morning there was", "one day there was", "near the {place} there was", "there was once"),),
    "where": ("in the {place}", "in a~ {place}", "at the {place}", "near the {place}", "by the {place}", "behind the {place}",
              "near a~ {place}", "in a small house", "in a dark {place}", "in a big {place}", "in a~ {place} far away", "far away", "far away, near the {place}",
              "deep in the {place}", "in a small house near the {place}", "{spot}", "{spot}", "next to the {place}", "on a hill", "in a land far away",
              "at home", "at school", "in the old house", "in the middle of the {place}", "in the [odd]", "in a~ [odd] [odd]", "on the [odd]", "under the [odd]",
              "at the [odd]", "once upon a time in the {place}", "once upon a time, in a~ {place} far away", "over the hill", "not far from the {place}"),
    "weather": ("a fine day", "a sunny day", "a cold day", "a dark night", "a cold night", "a beautiful day", "late", "early in the morning", "dark",
                "winter", "summer", "spring", "a windy day", "a sunny morning", "the first day of spring", "time to go home", "a quiet evening",
                "a dark and windy night", "the birthday of {friend}", "the best day of the year", "cold"),
    "sky": ("the sun was out", "the sun was high", "the sun came up", "the moon was high", "the wind was loud", "the rain fell on the {place}",
            "the sky was blue", "the sky was grey", "the stars were out", "the night was dark", "the house was quiet", "the door was open",
            "snow fell on the {place}", "the birds sang", "the children played", "nobody was at home", "everybody was asleep", "all was quiet",
            "the clouds were dark", "the water was cold", "the old house was empty", "the day was warm", "the road was long"),
    "say": ("Hello,", "Hello!", "Good morning,", "Where is my {obj}?", "Where are you?", "I am hungry,", "I am so tired,", "Come here,", "Come with me,",
            "Help!", "Help me!", "Look at that!", "What is that?", "Wait for me!", "I want to go home,", "Let us play,", "Who is there?",
            "Can you help me?", "I am lost,", "Thank you,", "Oh no!", "It is cold,", "I want to play,", "What is your name?", "[odd] [odd],",
            "[odd] the [odd]!", "I [odd] [odd],", "[odd]?"),
    "ask": ("Where is my {obj}?", "Where are you?", "What is that?", "Who is there?", "Can you help me?", "What is your name?", "Are you my friend?", "Why [odd] [odd]?",
            "May I come in?", "Do you want to play?", "[odd] [odd]?"),
    "speech": ("Hello, {friend}.", "I want to play.", "Where is {friend}?", "It is a fine day.", "I am hungry.", "Let us go to the {place}."),
    "i": ("I had", "I have", "I once had", "I know", "I once knew", "I saw", "I met", "we had", "we saw", "I went to the {place} and saw",
          "my friend had", "my best friend was", "my best friend is", "you know", "I want to tell you about", "let me tell you about"),
    "title": ("this is the story of", "this is a story about", "here is a story about", "a story about", "the story of", "listen to the story of"),
    "some": ("two [many]", "three [many]", "three little [many]", "the [many]", "some [many]", "many [many]", "all the [many]", "two little [many]", "the [odd] [many]"),
    "many": ("children", "friends", "girls", "boys", "cats", "dogs", "rabbits", "bears", "pigs", "birds", "mice", "animals", "people", "brothers", "sisters"),
    "lay": ("lay {spot}", "was {spot}", "was lost", "was very old", "stood {spot}", "was the best of all", "fell into the water"),
    "verb": ("saw", "found", "liked", "wanted", "took", "had", "made", "ate", "looked at", "went to", "played with", "was afraid of", "ran after", "heard"),
}  # fmt: skip

STORY_REQUESTS = words.STORY_REQUESTS + (  # more than the tokenizer was fitted to
    "Tell a {length}story{about}.", "Tell me another {length}story{about}.", "I would like a {length}story{about}.", "A {length}story{about}, please.",
    "Can I have a {length}story{about}?", "Do you know a {length}story{about}?", "Do you have a {length}story{about}?", "I want a {length}story{about}.",
    "Could you tell me a {length}story{about}?", "Please write a {length}story{about}.", "Let us hear a {length}story{about}.", "One more {length}story{about}!",
    "Read me a {length}story{about}.", "Write me a {length}story{about}.",
)  # fmt: skip
STORIES = "I know stories about lost things, gifts, races, storms and treasures. Which one would you like?"
TALK = {  # small talk, answered in the one way
    "What stories do you know?": STORIES, "Which stories can you tell?": STORIES, "What are your stories about?": STORIES, "Tell me something.": STORIES,
    "Help": STORIES, "Can you help me?": STORIES, "What can I ask you?": STORIES, "What do you know?": STORIES, "What should I ask?": STORIES,
    "Good afternoon": "Good afternoon! Would you like to hear a story?", "Good evening": "Good evening! Would you like to hear a story?",
    "Hi!": "Hello! Would you like to hear a story?", "Hello!": "Hello! How are you today?", "Hello there": "Hello! It is nice to meet you.",
    "Bye": "Goodbye! See you soon.", "Bye bye": "Goodbye! See you soon.", "See you": "Goodbye! See you soon.", "Nice to meet you": "It is nice to meet you too.",
    "How do you do?": "I am fine, thank you.", "What is up?": "I am fine, thank you.", "How are you today?": "I am fine, thank you. How are you?",
    "I am fine": "That is good. Would you like to hear a story?", "I am sad": "I am sorry. Would you like to hear a story?", "You are nice": "Thank you. You are nice too.",
    "What is this?": "I am a small storyteller.", "What are you called?": "You can call me Storyteller.", "Yes, please": STORIES, "Very good": "Thank you. Would you like to hear a story?",
}  # fmt: skip

VERBS = frozenset(text.split()[0] for name in ("did", "was", "both", "lay", "verb") for text in GRAMMAR[name])

UNKNOWN = {  # kind of request: what may be asked, and the honest answers to it
    "joke": (("Tell me a joke.", "Do you know a joke?", "Tell me something funny.", "Tell me a joke about [odd].", "Make me laugh.", "Say something funny.",
              "Tell me another joke.", "Can you tell me a riddle?", "Tell me a riddle."), ("I do not know any jokes. I only know stories.",)),
    "song": (("Sing a song.", "Sing me a song about [odd].", "Write a song.", "Write a poem.", "Write a poem about [odd].", "Can you sing?", "Write me a haiku about [odd].",
              "Can you write a poem?", "Recite a poem."), ("I cannot sing or write poems. I only know stories.",)),
    "task": (("Write a program that can [odd] [odd].", "Write code for [odd].", "Write an email to [odd].", "Translate [odd] [odd] into [odd].", "Translate this: [odd]",
              "Draw a~ [odd].", "Write an essay about [odd].", "Give me a recipe for [odd].", "Help me with [odd].", "Summarise [odd] [odd].", "Play [odd] with me.",
              "Can you [odd] the [odd]?", "Give me a list of [odd].", "Show me a~ [odd].", "Please [odd] my [odd].", "Give me advice on [odd].", "Order a~ [odd] for me."),
             ("I cannot do that. I only know stories.", "That is too hard for me. I only know stories.")),
    "fact": (("What is [odd]?", "What is a~ [odd]?", "What are [odd]?", "Who is [odd]?", "Who was [odd]?", "Who wrote [odd]?", "Who made the [odd]?", "Where is [odd]?", "Where is the [odd]?",
              "When was [odd] [odd]?", "When did [odd] [odd]?", "Why is the [odd] [odd]?", "Why do [odd] [odd]?", "How does a~ [odd] work?", "How do I [odd] a~ [odd]?", "How many [odd] are there?",
              "How old is [odd]?", "How far is [odd]?", "Explain [odd].", "Explain [odd] to me.", "Tell me about [odd].", "What do you know about [odd]?", "Do you know [odd]?", "What does [odd] mean?",
              "Is [odd] [odd]?", "Is the [odd] bigger than the [odd]?", "Which [odd] is the [odd]?", "Which is better, [odd] or [odd]?", "How big is the [odd]?", "Are [odd] [odd]?", "Does the [odd] [odd]?",
              "How can I [odd]?", "What is the [odd] of [odd]?", "What is the best [odd]?", "Who invented the [odd]?", "Why?", "How?", "What happened in 1[digit][digit][digit]?",
              "Why is the sky blue?", "What is the meaning of life?", "How do birds fly?", "Where do fish live?", "What is the biggest animal?", "Who lives in the {place}?", "What is a {obj}?", "What is {a_animal}?"),
             ("I do not know that. I only know stories and a few easy facts.",)),
    "sum": (("What is [digit][digit] + [digit][digit]?", "What is [digit] + [digit][digit]?", "[digit][digit][digit] + [digit] = ?", "What is [digit] * [digit]?", "What is [digit] - [digit]?", "[digit] - [digit] = ?",
             "What is [digit] times [digit]?", "What is [digit] minus [digit]?", "[digit][digit] / [digit] = ?", "How much is [digit][digit] * [digit]?", "Divide [digit] by [digit].", "Multiply [digit] and [digit].",
             "How much is [digit][digit][digit] + [digit][digit][digit]?", "What is [digit][digit] plus [digit]?"), ("I can only add two small numbers.",)),
    "capital": (words.CAPITAL_QUESTIONS, ("I do not know that capital.",)),
    "colour": (words.COLOUR_QUESTIONS, ("I do not know that colour.",)),
    "sound": (words.SOUND_QUESTIONS, ("I do not know that sound.",)),
    "opposite": (words.OPPOSITE_QUESTIONS, ("I do not know that opposite.",)),
    "story": (STORY_REQUESTS, ("I do not know a story about that. May I tell you one about {a_animal}?",)),
    "self": (("Are you a~ [odd]?", "Are you alive?", "Are you real?", "Are you human?", "How old are you?", "Where do you live?", "Where are you from?", "Do you like [odd]?", "Do you love me?", "Who made you?",
              "What are you?", "Do you have a~ [odd]?", "Are you happy?", "Can you think?", "What do you like?", "Are you smart?", "Do you dream?", "What is your favourite [odd]?", "Do you sleep?",
              "Tell me about you.", "What did you do today?", "Are you ChatGPT?"),
             ("I am only a small storyteller.",)),
    "today": (("What is the weather today?", "What time is it?", "What day is it?", "What is the date?", "Is it raining?", "What is the news?", "How is the weather in [odd]?", "What happened today?", "Will it rain tomorrow?",
               "What year is it?", "Who won the [odd]?", "Is it cold in [odd]?"), ("I do not know what happens outside. I only know stories.",)),
    "words": (("[odd]", "[odd] [odd]", "[odd] [odd] [odd]", "[odd] [odd] [odd] [odd] [odd]", "[odd]!", "[odd]?", "I [odd] [odd].", "I am [odd].", "My [odd] is [odd].", "The [odd] is [odd].", "You are [odd].",
               "I want a~ [odd].", "I like [odd].", "I hate [odd].", "Yes.", "No.", "Okay.", "Test", "test", "[digit][digit][digit]", "[digit]", "asdf", "...", "?", "What?", "[odd] [odd]? [odd]!", "Let us [odd].", "I feel [odd]."),
              ("I do not understand that. Would you like to hear a story?",)),
}  # fmt: skip
UNKNOWN_WEIGHTS = {
    "joke": 6, "song": 6, "task": 10, "fact": 24, "sum": 8, "capital": 4, "colour": 3, "sound": 3, "opposite": 3, "story": 6, "self": 7,
    "today": 6, "words": 10,
}  # fmt: skip


def expand(rng: random.Random, text: str) -> str:
    """Every [name] of the text replaced, those of what it is replaced by too; CUT follows each odd word."""

    def one(match: re.Match) -> str:
        name = match.group(1)
        if name.lower() in ODD:
            word, known = odd_words.draw(rng, ODD[name.lower()])
            return (capitalised(word) if name[0].isupper() else word) + ("" if known else CUT)
        if name == "digit":
            return str(rng.randint(1, 9))
        if name == "number":
            return str(rng.choice((rng.randint(2, 12), rng.randint(1000, 3000)))) + CUT
        expanded = expand(rng, rng.choice(GRAMMAR[name.lower()]))
        return capitalised(expanded) if name[0].isupper() else expanded

    return re.sub(r"\[(\w+)\]", one, text)


def opening(rng: random.Random, unknown: tuple[str, ...] = ()) -> str:
    """An opening with its fields still open and one CUT, which stands behind all odd words and the fields in `unknown`.

    A field in `unknown` is one that the model cannot know the value of; such a {kind} is named once.
    """
    while True:
        text = capitalised(expand(rng, rng.choice(GRAMMAR["start"])))
        if all(f"{{{field}}}" in text for field in unknown) and not ("kind" in unknown and text.count("{kind}") > 1):
            break
    for field in unknown:
        text = text.replace(f"{{{field}}}", f"{{{field}}}{CUT}", 1)
    return place_cut(rng, text)


def place_cut(rng: random.Random, text: str) -> str:
    """One CUT: at a word's end behind the marks already there, often the first one, else any of the first eight."""
    known = len(text[: text.rfind(CUT) + 1].replace(CUT, ""))
    text = text.replace(CUT, "")
    ends = [match.start() for match in re.compile(r" |$|(?<=\w)[.,]").finditer(text, known)][:8]
    end = ends[0] if rng.random() < (0.45 if known else 0.15) else rng.choice(ends)
    return text[:end] + CUT + text[end:]


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_articles(text: str) -> str:
    """ "a~" as "a" or "an", by the letter that follows."""
    return re.sub(
        rf"\b([Aa])~(?={CUT}? (\w))",
        lambda match: match.group(1) + ("n" if match.group(2) in "aeiouAEIOU" else ""),
        text,
    )


def unknown(rng: random.Random) -> tuple[str, str]:
    """A request that the storyteller cannot fulfil, and its honest answer."""
    kind = rng.choices(tuple(UNKNOWN_WEIGHTS), tuple(UNKNOWN_WEIGHTS.values()))[0]
    requests, answers = UNKNOWN[kind]
    odd = odd_words.draw(rng, "odd")[0]
    about = rng.choice((" about [odd]", " about a~ [odd]", " about the [odd]", " about a~ [odd] and a~ [odd]"))
    fields = {
        "key": rng.choice(("", "", "a~ ", "the ")) + odd if kind in ("colour", "sound") else capitalised(odd) if kind == "capital" else odd,
        "about": expand(rng, about), "length": rng.choice(("", "", "short ", "long ")), "place": rng.choice(words.PLACES),
        "obj": rng.choice(words.OBJECTS), "a_animal": "a~ " + rng.choice(words.ANIMALS),
    }  # fmt: skip
    question, answer = (expand(rng, rng.choice(texts)).format_map(fields) for texts in (requests, answers))
    return with_articles(question.replace(CUT, "")), with_articles(answer)


def careless(rng: random.Random, text: str) -> str:
    """The text as many type it: often with a small first letter, without the mark at its end, or both."""
    if rng.random() < 0.5 and not re.match(r"I\b", text):
        text = text[:1].lower() + text[1:]
    return text.rstrip(".?!") or text if rng.random() < 0.5 else text
