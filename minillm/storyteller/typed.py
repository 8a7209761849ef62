"""What people type first: openings of a story in every form, and requests that the storyteller cannot fulfil.

`opening` expands a small grammar into the first sentence or two of a story. A mark, CUT, says where the typed part ends:
the training text reads what stands before it and learns what stands after it. `unknown` draws a request outside of what
the storyteller knows, with its honest answer. Odd words (a list, and words made of random letters) stand for all that
people may type; they are read and never learned, because CUT always comes after the last of them.

A name in square brackets is expanded from GRAMMAR, with a capital letter when the name has one; the fields in braces
are those of `vocabulary`, and {a_kind}, {him} of the hero. "a~" is "a" or "an".
"""

# ruff: noqa: E501, SIM905 -- a sentence stays on one line, and a list of words is one text

import random
import re

from minillm.storyteller import vocabulary as words

CUT = "¦"  # stands in no word of the corpus

OTHER_HEROES = {  # heroes that only an opening brings, by pronoun; "" is an animal's name and pronoun
    "she": "girl woman princess queen witch fairy mermaid teacher mother grandmother".split(),
    "he": "boy man king prince farmer wizard giant knight pirate sailor father grandfather".split(),
    "": "dragon cow pig horse wolf lion bird bee sheep snake monkey elephant tiger monster ghost unicorn fish puppy "
    "kitten spider whale star tree cloud".split(),
}  # fmt: skip

ODD_WORDS = """
    computer engine kernel planet rocket bridge tower doctor nurse police soldier captain engineer scientist president
    pizza sandwich chicken potato sugar coffee soup salad butter window kitchen bathroom office hospital church museum
    station airport hotel library factory street valley ocean lake volcano jungle swamp cave galaxy moon universe
    guitar piano camera phone radio television bicycle truck plane ship tractor sword shield cannon helmet boots
    jacket dress trousers sweater glasses pocket money price shop holiday weekend monday friday january
    money history physics science music art poetry grammar python javascript algebra gravity energy electricity
    memory cache token batch attention transformer network internet website email password keyboard screen cable
    football tennis chess dance theatre movie actor singer painter writer poet news politics election war peace law
    love hate anger fear hope dream idea truth lie secret magic luck death life heaven weather thunderbolt ice fog
    happiness health medicine cough fever tooth stomach finger shoulder knee elbow eye nose mouth ear hair skin bone
    buy sell build break throw catch push pull climb swim fly drive ride cook bake wash clean paint draw write read
    jumped shouted whispered dreamed wondered decided travelled arrived escaped fought painted cooked hid climbed
    quickly slowly carefully loudly very strange huge wooden broken frozen invisible electric modern ancient famous
    important difficult dangerous expensive cheap heavy sweet sour salty bitter spicy crazy shiny
    about against between without during because although while since until however therefore maybe perhaps always
    explain describe translate summarise compare calculate solve list define prove recommend suggest
    Einstein Shakespeare Mozart Napoleon Caesar Newton Darwin Google Amazon Tesla Batman Superman Disney Brazil India
    Mexico Australia Turkey Africa Europe America Asia Chicago Boston Sydney Delhi
""".split()  # fmt: skip
ODD_NAMES = """
    Sophie Jacob Emily Hannah Daniel Laura Robert Susan George Linda Frank Julia Martin Karen Paul Helen Chris Diana
    Steve Maria Pedro Ahmed Yuki Chen Priya Ingrid Lars Pierre Marco Elena Boris Natasha Goldie Snowy Rex Bella Charlie
    Molly Jasper Oliver Harry Ron Arthur Merlin Robin Hansel Gretel Cinderella Rapunzel Pinocchio
""".split()  # fmt: skip
SYLLABLES = "ba be bo da di fo ga glo go ka ki lo lu ma mi mo na ne ni pa po ra ri ro sa shi so ta ti tra ver wo xi zan zo".split()

GRAMMAR = {
    "start": (
        *("[np] [did]. [named]",) * 6, *("[np] named {hero} [did].",) * 3, "[np] called {hero} [did].",
        "[np], whose name was {hero}, [did].", "[np] and {friend} [both]. [named]", "[np] [was]. [named]",
        *("[when] [np] [did]. [named]",) * 5, *("[when] [np] named {hero} [did].",) * 4, "[when] [np] and {friend} [both]. [named]",
        *("[there] a~ [kind] named {hero}.",) * 4, *("[there] a~ [kind] named {hero} who [did].",) * 2,
        "[there] a~ [kind] called {hero}.", "[there] a~ [kind] who [did]. [named]", "[there] a~ [kind]. [named]",
        *("{hero} [did].",) * 3, *("{hero} was a~ [kind] who [did].",) * 2, "{hero} was a~ [kind].", "{hero} [was].", "{hero}, a~ [kind], [did].",
        *("[when] {hero} [did].",) * 3, "{hero} and {friend} [both].", "{hero} and {friend} [both].", "[when] {hero} and {friend} [both].",
        "It was [weather]. [Np] named {hero} [did].", "It was [weather]. {hero} [did].", "It was [weather], and {hero} [was].",
        "It was [weather] when a~ [kind] named {hero} [did].", "It was [weather] at the {place}. {hero} [did].",
        "It was a~ [kind] named {hero} who [did].", "It was {hero} who [did].",
        *("[where] lived a~ [kind] named {hero}.",) * 3, "[where], there lived a~ [kind] named {hero}.", "[where] there was a~ [kind] named {hero}.",
        "[where], there was a~ [kind] named {hero}.", "[where], a~ [kind] named {hero} [did].", "[where], {hero} [did].",
        "[where] was a~ [kind]. [named]", "[when] [where], there lived a~ [kind] named {hero}.",
        "\"[say]\" said {hero}. {hero} was a~ [kind].", "\"[say]\" said the [kind]. [named]", "\"[say]\" said a~ [kind] named {hero}.",
        "\"[say]\" said {hero} to {friend}.", "\"[ask]\" asked {hero}.", "\"[ask]\" asked the [kind]. [named]", "{hero} said, \"[speech]\"", "[np] said, \"[speech]\" [named]",
        "[sky]. [Np] named {hero} [did].", "[sky]. {hero} [did].", "[sky], and {hero} [did].", "[sky], and a~ [kind] named {hero} [did].",
        "[i] a~ [kind] named {hero}.", "[i] a~ [kind] named {hero} who [did].", "[i] a~ [kind]. [named]", "my {kind} is called {hero}.",
        "[title] a~ [kind] named {hero} who [did].", "[title] {hero}, a~ [kind].", "[title] {hero} and {friend}. {hero} was a~ [kind].",
        "{He} [did]. [named]", "{He} [was]. [named]", "{He} was a~ [kind] named {hero}.", "[when] {he} [did]. [named]",
        "they [both]. One of them was a~ [kind] named {hero}.", "[some] [both]. One of them was called {hero}.",
        "[some] [both]. One of them was called {hero}.", "two friends, {hero} and {friend}, [both].", "there were [some]. One of them was called {hero}.",
        "[the] {colour} {obj} [lay]. It belonged to a~ [kind] named {hero}.", "[the] {colour} {obj} [lay]. {hero} wanted it.",
        "[the] {place} was quiet. {hero} [did].", "[the] {place} was beautiful. A~ [kind] named {hero} [did].",
        "when {hero} [did], the sun was out.", "when [np] [did], it was cold. [named]", "when the sun was out, {hero} [did].",
        "{hero} [did] [more].", "[np] [did] [more]. [named]", "[where], [np] [did]. [named]", "there is a~ [kind] named {hero} at the {place}.",
        "I am a~ [kind] named {hero}, and this is my story.", "my name is {hero}, and this is my story. I was a~ [kind] who [did].",
        "if you go to the {place}, you will see a~ [kind] named {hero}.", "we went to the {place} and saw a~ [kind] named {hero}.",
        # what is odd or cut off: it is read, and the story goes on
        "[np] [odd] [more]. [named]", "[np] [odd] [more]. [named]", "[np] [odd] [odd] [more]. [named]", "[np] [verb] the [odd] [more]. [named]",
        "[np] [odd] the [odd] [more]. [named]", "[np] [was] [odd] [more]. [named]", "[np] [odd], but {he} was not afraid. [named]", "[np] was [odd]. [named]",
        "{hero} [odd] [more].", "{hero} [verb] a~ [odd] [more].", "{hero} and the [odd] [both].", "{hero} [odd] the [odd] [more].", "{hero} was [odd] [more].",
        "{hero}'s [odd] [was]. {hero} [did].", "{hero} and {friend} [odd] [odd] at the {place}.", "[when] {hero} [odd] [odd] [more].",
        "[odd] [odd] [odd]. [Np] named {hero} [did].", "[odd] [odd] [odd] [odd]. {hero} [did].", "the [odd] [was]. {hero} [did].",
        "my [odd] [was]. It belonged to a~ [kind] named {hero}.", "[when] [odd] [odd] [odd]. {hero} [did].", "[when] the [odd] [odd], and {hero} [did].",
        "[np] who [odd] [odd] [did]. [named]", "[np] with a~ [odd] [did]. [named]", "[np] [prep] the [odd] [did]. [named]", "[np] [prep] the [odd] [odd] [did]. [named]",
        "{hero}, the [odd] [odd], [did].", "{hero} [odd] and {friend} [both].", "[np] and the [odd] [both]. [named]", "[np] and {his} [odd] [both]. [named]",
        "{hero} and {his} [odd] [both].", "my [odd] [odd] [clause] a~ [kind] named {hero} [did].", "I [odd] [odd] [clause] a~ [kind] named {hero} [did].",
        "[odd] [odd] [clause] {hero} [did].", "[odd] [clause] a~ [kind] named {hero} [did].", "nobody [odd] [clause] {hero} [did].", "[odd] [odd] [clause] the {kind} named {hero} [did].",
        "{hero} [odd] [clause] {he} [did].", "[np] [odd] [clause] {he} [did]. [named]", "{hero} was [odd] [clause] {he} [did].", "[clause] I was [odd], a~ [kind] named {hero} [did].",
        "[prep] the [odd] [odd], {hero} [did].", "[odd] [odd], a~ [kind] named {hero} [did].", "[odd] [odd], the [kind] [did]. [named]", "there was a~ [odd], and {hero} [did].",
        "there was no [odd] [more]. {hero} [did].", "it was [odd] [odd] [clause] {hero} [did].", "[some] and a~ [odd] [both]. One of them was called {hero}.",
        "[i] a~ [odd], and a~ [kind] named {hero} [did].", "I [odd] [odd], and a~ [kind] named {hero} [did].",
    ),
    "prep": ("in", "of", "on", "at", "near", "from", "behind", "under", "with", "by", "without"),
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


def odd_word(rng: random.Random) -> str:
    """A word from ODD_WORDS, or one of syllables, or one of letters."""
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(ODD_WORDS)
    if draw < 0.85:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) + rng.choice(
            ("", "", "n", "s", "ed", "ing", "er")
        )
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))


def odd_name(rng: random.Random) -> str:
    """A name that is none of the corpus's."""
    return (
        rng.choice(ODD_NAMES)
        if rng.random() < 0.6
        else "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).title()
    )


def expand(rng: random.Random, text: str) -> str:
    """Every [name] of the text replaced, those of what it is replaced by too; CUT follows each odd word."""

    def one(match: re.Match) -> str:
        name = match.group(1)
        if name == "odd":
            return odd_word(rng) + CUT
        if name == "digit":
            return str(rng.randint(1, 9))
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
    end = ends[0] if rng.random() < 0.2 else rng.choice(ends)
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
    odd = odd_word(rng)
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
