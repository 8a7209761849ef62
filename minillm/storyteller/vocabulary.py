"""The words the corpus is made of: who, what, where, the plots, and the facts of the chat turns.

Names and objects are chosen so that each is one token of the trained tokenizer; every sentence here is our own.
A plot sentence may use these fields: {hero} {friend} {obj} {an_obj} {colour} {place} {spot} {feeling}, and {he} {He} {his} {His} for
the hero; an opening also {adj} {kind}, a friend line {a_fkind}.
"""

# ruff: noqa: E501 -- a sentence stays on one line

from typing import NamedTuple

GIRLS = (
    "Mia", "Lily", "Anna", "Zoe", "Emma", "Rosa", "Clara", "Nora", "Ella", "Lucy",
    "Maya", "Ruby", "Alice", "Sara", "Ivy", "Hanna", "June", "Tara", "Olga", "Leila",
)  # fmt: skip
BOYS = (
    "John", "Tom", "Ben", "Max", "Leo", "Sam", "Oscar", "Finn", "Hugo", "Noah",
    "Theo", "Adam", "Luca", "Peter", "David", "Omar", "Ravi", "Jack", "Felix", "Kenji",
)  # fmt: skip
ANIMAL_NAMES = {
    "Pip": "he", "Dot": "she", "Momo": "he", "Kiki": "she", "Bruno": "he", "Luna": "she", "Nibbles": "he", "Daisy": "she",
    "Rusty": "he", "Pearl": "she", "Ziggy": "he", "Honey": "she", "Bolt": "he", "Willow": "she", "Otto": "he", "Coco": "she",
}  # fmt: skip
ANIMALS = (
    "fox", "rabbit", "bear", "mouse", "cat", "dog", "duck", "frog", "hedgehog", "squirrel",
    "turtle", "owl", "goat", "lamb", "penguin", "pony",
)  # fmt: skip
OBJECTS = (
    "kite", "ball", "drum", "lamp", "map", "ring", "bell", "boat", "book", "box", "button", "cap", "coin", "crown", "cup", "doll",
    "feather", "flute", "glove", "hammer", "hat", "horn", "jar", "key", "ladder", "lantern", "mask", "mirror", "mitten", "necklace",
    "pebble", "pencil", "pillow", "puppet", "puzzle", "ribbon", "robot", "rope", "sack", "scarf", "shell", "shoe", "spoon", "stone",
    "telescope", "train", "trumpet", "umbrella", "violin", "wagon", "whistle", "clock", "basket", "blanket", "bucket", "compass",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "golden", "silver", "purple", "pink")
PLACES = (
    "forest", "beach", "farm", "village", "castle", "park", "river", "hill", "market", "school",
    "garden", "island", "harbour", "meadow", "mountain", "desert",
)  # fmt: skip
SPOTS = (
    "under a bench", "behind a tree", "in the tall grass", "under a big leaf", "beside the old gate", "in a dark corner",
    "behind the wall", "under the stairs", "next to the well", "between two rocks", "in a deep hole", "inside a hollow log",
)  # fmt: skip
ADJECTIVES = (
    "little",
    "little",
    "little",
    "little",
    "little",
    "young",
    "kind",
    "clever",
    "shy",
    "cheerful",
    "quiet",
    "curious",
)
FEELINGS = ("happy", "proud", "glad", "calm", "merry", "thankful")


class Plot(NamedTuple):
    """One plot: the request that asks for it, its telling in a few sentences, and its telling in full."""

    topic: str  # what a request calls it, "" when the plot is asked for by its object
    keyword: str  # the word that a story about the topic contains, "" with an empty topic
    short: tuple  # beats; each beat is a tuple of alternative sentences, one is told
    full: tuple  # the same plot in detail; a beat whose first entry is None may be left out


PLOTS = {
    "lost": Plot(
        "", "",
        (
            ("One day, {hero} lost {his} {colour} {obj}.", "But one morning, {hero} lost the {colour} {obj} that {he} loved.",
             "At the {place}, {hero} lost a {colour} {obj}."),
            ("{friend} helped to look, and they found the {obj} {spot}.", "Then {he} looked again and found the {obj} {spot}.",
             "{He} looked all day and found the {obj} {spot}."),
            ("Now {hero} was {feeling} again.", "With the {obj} in {his} arms, {hero} went home.", "That night {hero} slept well."),
        ),
        (
            ("More than anything, {hero} loved {his} {colour} {obj}.", "{He} had a {colour} {obj} and took it everywhere.",
             "{His} best thing was a {colour} {obj}."),
            (None, "Every morning {he} said hello to the {obj}.", "The {obj} came from {his} grandmother."),
            ("One day, {hero} lost the {obj} at the {place}.", "But one windy day, the {obj} was lost.",
             "Then something bad happened, and {he} lost the {obj}."),
            (None, "{He} looked here and {he} looked there, but there was no {obj}.", "{He} sat down and began to cry."),
            ("Soon {friend} came along and asked what was wrong.", "{friend} saw how sad {hero} was and came closer."),
            ("\"I lost my {obj},\" said {hero}.", "\"My {obj} is gone,\" said {hero}."),
            ("\"Do not worry, we will find your {obj},\" said {friend}.", "\"Let us look for the {obj} together,\" said {friend}."),
            (None, "They asked everyone at the {place} about the {obj}.", "They walked slowly and looked left and right."),
            ("At last, {friend} found the {obj} {spot}.", "In the end, {hero} found the {obj} {spot}."),
            ("\"I have my {obj} again, thank you!\" said {hero}.", "{hero} held the {obj} tight and thanked {friend}."),
        ),
    ),
    "gift": Plot(
        "a gift", "gift",
        (
            ("One day, {hero} made a gift for {friend}.", "It was a special day, so {hero} had a gift for {friend}."),
            ("It was a {colour} {obj}.", "In the paper was a {colour} {obj}."),
            ("{friend} loved the {obj} and hugged {hero}.", "\"What a fine {obj}!\" said {friend}."),
        ),
        (
            ("It was a special day, because {hero} had a gift for {friend}.", "One day, {hero} wanted to give {friend} a gift."),
            ("It was a {colour} {obj}.", "The gift was a {colour} {obj} in a paper bag."),
            (None, "{hero} had worked on the {obj} for three days.", "{He} had saved money for the {obj}."),
            ("But on the way, it began to rain and the paper got wet.", "But on the way, the gift fell into the mud."),
            ("\"Oh no, the {obj} is dirty,\" said {hero}.", "{hero} looked at the wet {obj} and felt sad."),
            (None, "{He} cleaned the {obj} with {his} sleeve.", "{He} wanted to go back home."),
            ("Then {friend} opened the door and saw the {obj}.", "Just then {friend} came and saw the {obj}."),
            ("\"This {obj} is the best gift of all,\" said {friend}.", "\"I always wanted {an_obj},\" said {friend}."),
            ("They played with the {obj} until it was dark.", "{hero} and {friend} took the {obj} to the {place}."),
        ),
    ),
    "share": Plot(
        "sharing", "share",
        (
            ("{hero} had {an_obj}, and {friend} had none.", "{hero} did not want to share the {obj} with {friend}."),
            ("{friend} looked sad, so {hero} learned to share.", "Then {hero} saw a tear and said, \"We can share it.\""),
            ("Together they had more fun with the {obj}.", "The {obj} was better with two."),
        ),
        (
            ("One day, {hero} got a new {colour} {obj}.", "{hero} came to the {place} with a {colour} {obj}."),
            ("{friend} wanted to try the {obj} too.", "\"May I try the {obj}?\" asked {friend}."),
            ("But {hero} did not want to share.", "\"No, I will not share it,\" said {hero}."),
            (None, "{friend} went away and sat alone.", "{friend} said nothing and looked at the ground."),
            (None, "{hero} played alone, but it was not fun.", "Soon the {obj} was boring."),
            ("Then {hero} thought about {friend} and felt sorry.", "After a while, {hero} missed {friend}."),
            ("\"Here is the {obj}, let us share,\" said {hero}.", "\"I am sorry, we can share the {obj},\" said {hero}."),
            ("{friend} smiled, and they took turns.", "So {friend} came back and they played with the {obj}."),
        ),
    ),
    "race": Plot(
        "a race", "race",
        (
            ("One day, {hero} and {friend} ran a race at the {place}.", "There was a race at the {place}, and {hero} ran with {friend}."),
            ("Near the end, {friend} fell, and {hero} stopped to help.", "{hero} was slow but never stopped."),
            ("The prize was {an_obj}, and they took it home together.", "In the end, {hero} won a {colour} {obj}."),
        ),
        (
            ("One day, there was a big race at the {place}.", "Every spring, there was a race at the {place}."),
            ("The prize was a {colour} {obj}.", "Whoever won would get a {colour} {obj}."),
            (None, "{hero} ran up and down every day to get strong.", "Everyone came to watch."),
            ("\"I will win the {obj},\" said {hero}.", "{hero} wanted the {obj} very much."),
            ("When the flag went down, {hero} and {friend} ran as fast as they could.", "Off they went, and {friend} was right behind {hero}."),
            ("But then {friend} fell down and hurt a foot.", "But near the end, {friend} slipped and fell."),
            ("So {hero} stopped the race and helped {friend} up.", "{hero} turned back and took {friend} by the hand."),
            (None, "Everybody clapped when they came in last.", "They were the last ones, but nobody laughed."),
            ("The judge gave the {obj} to {hero} for being kind.", "The {obj} went to {hero}, who had the biggest heart."),
            ("\"We will keep the {obj} together,\" said {hero} to {friend}.", "{friend} and {hero} carried the {obj} home."),
        ),
    ),
    "storm": Plot(
        "a storm", "storm",
        (
            ("One night, a storm came to the {place}.", "A big storm came, and {hero} was afraid."),
            ("{hero} held {his} {obj} and sang a song.", "{friend} sat with {hero}, and they held hands."),
            ("By morning the storm was gone and the sun was out.", "Soon the storm was over, and {hero} laughed."),
        ),
        (
            ("One evening, dark clouds came over the {place}.", "One day, the sky over the {place} turned grey."),
            ("A big storm was coming.", "It was the start of a storm."),
            ("{hero} took {his} {obj} and ran inside.", "{hero} hid under the bed with a {colour} {obj}."),
            (None, "The wind was loud and the windows shook.", "Boom went the thunder, again and again."),
            ("Then there was a knock, and {friend} stood at the door.", "Then {hero} heard {friend} calling in the rain."),
            ("\"Come in, {friend}, you are all wet,\" said {hero}.", "\"Come quickly, {friend}!\" said {hero}."),
            ("\"I am afraid of the storm,\" said {friend}.", "{friend} was shaking and could not speak."),
            ("So {hero} gave the {obj} to {friend} and told a funny tale.", "\"Hold my {obj} and you will feel brave,\" said {hero}."),
            (None, "They counted the seconds after each flash.", "They drank warm milk and waited."),
            ("In the morning, the storm was over and the sky was blue.", "When they woke up, the storm was gone."),
        ),
    ),
    "seed": Plot(
        "a seed", "seed",
        (
            ("One day, {hero} put a seed in the ground.", "{friend} gave {hero} a tiny seed."),
            ("{He} gave the seed water every day.", "The rain came and the seed began to grow."),
            ("In summer, there was a {colour} flower.", "Soon a {colour} flower stood at the {place}."),
        ),
        (
            ("One spring day, {friend} gave {hero} a tiny seed.", "One day, {hero} found a seed at the {place}."),
            ("{hero} put the seed into a hole and gave it water.", "So {hero} made a hole and put the seed in."),
            (None, "{He} came back every morning to look.", "\"Grow, little seed, grow,\" said {hero}."),
            ("But for many days, nothing happened.", "A week went by, but there was nothing to see."),
            ("\"My seed will never grow,\" said {hero}.", "{hero} was sad and almost gave up."),
            ("\"A seed needs time,\" said {friend}.", "\"You must wait a little more,\" said {friend}."),
            (None, "So {hero} waited, and it was hard.", "So {he} waited and gave the seed more water."),
            ("Then one morning, a {colour} flower stood in the sun.", "At last there was a {colour} flower, taller than {hero}."),
            ("{hero} and {friend} danced around the flower.", "{hero} gave the first flower to {friend}."),
        ),
    ),
    "picnic": Plot(
        "a picnic", "picnic",
        (
            ("One day, {hero} and {friend} had a picnic at the {place}.", "{hero} asked {friend} to a picnic at the {place}."),
            ("But the ants came and ate the cake.", "Then a bird took the bread."),
            ("They laughed and ate the apples.", "{friend} had more food, so nobody was hungry."),
        ),
        (
            ("On a sunny day, {hero} wanted to have a picnic.", "One day, {hero} asked {friend} to a picnic at the {place}."),
            ("{He} put bread, cheese and a cake next to {his} {obj}.", "{He} packed a cake, some apples and {his} {obj}."),
            (None, "{friend} brought cold juice.", "They found a nice place in the shade."),
            ("But when they sat down, the cake was gone.", "But when {hero} looked, there was no cake."),
            ("\"Who took the cake?\" asked {friend}.", "\"Where is our cake?\" asked {hero}."),
            (None, "They saw small footprints in the sand.", "They looked behind the {obj} and under the trees."),
            ("A hungry bird was eating it with its babies.", "A family of ants was carrying it away."),
            ("\"Let them have it,\" said {hero}, \"we have apples.\"", "{friend} laughed and said, \"They need it more.\""),
            ("It was the best picnic of the year.", "After the picnic, {hero} and {friend} slept in the sun."),
        ),
    ),
    "birthday": Plot(
        "a birthday", "birthday",
        (
            ("Today was the birthday of {friend}.", "One day, it was the birthday of {friend}, and {hero} knew it."),
            ("{hero} came with a {colour} {obj} and a song.", "So {hero} made a cake and brought {an_obj}."),
            ("It was a birthday to remember.", "{hero} and {friend} danced all night."),
        ),
        (
            ("It was the birthday of {hero}.", "One morning, {hero} woke up early, because it was a birthday."),
            ("But nobody at the {place} said anything.", "But the house was quiet and empty."),
            ("\"Did they forget me?\" thought {hero}.", "{hero} thought that all had forgotten."),
            (None, "{He} walked alone and kicked the sand.", "{He} asked {friend}, but {friend} only smiled."),
            ("In the evening, {friend} said, \"Come with me, {hero}.\"", "Then {friend} took {hero} by the hand."),
            (None, "They went down a dark road.", "They walked to an old door."),
            ("Suddenly the lights went on, and everybody sang.", "\"Surprise!\" shouted all the friends."),
            ("{friend} gave {hero} a {colour} {obj}.", "There was a cake, and beside it a {colour} {obj}."),
            ("\"I love the {obj}, and I love my friends,\" said {hero}.", "\"Thank you for the {obj},\" said {hero} to {friend}."),
        ),
    ),
    "treasure": Plot(
        "a treasure", "treasure",
        (
            ("One day, {hero} heard of a treasure at the {place}.", "An old man told {hero} about a treasure."),
            ("{He} dug {spot} and hit something hard.", "{friend} came along, and they dug {spot}."),
            ("The treasure was a {colour} {obj}.", "In the ground was {an_obj}, and that was the treasure."),
        ),
        (
            ("One day, {hero} found a piece of paper that showed a treasure.", "Grandfather told {hero} about a treasure at the {place}."),
            ("\"Come with me, {friend}, we will find it,\" said {hero}.", "So {hero} asked {friend} to come along."),
            (None, "They walked all morning and sang.", "They took bread, water and a spade."),
            ("They dug a hole, but found only sand.", "They dug and dug, but there was nothing."),
            ("\"I want to go home,\" said {friend}.", "{friend} was tired and sat down."),
            ("\"One more time,\" said {hero}.", "But {hero} tried once more {spot}."),
            ("There it was, a {colour} {obj}!", "Something shone, and it was a {colour} {obj}."),
            (None, "It was not gold, but the {obj} was beautiful.", "\"Is this {obj} the treasure?\" asked {friend}."),
            ("\"The {obj} is nice, but you are my treasure, {friend},\" said {hero}.", "{hero} and {friend} kept the {obj} as their treasure."),
        ),
    ),
    "brave": Plot(
        "being brave", "brave",
        (
            ("{hero} was afraid of the dark.", "{hero} did not like the dark at all."),
            ("One night, {friend} was lost, so {hero} had to be brave.", "{hero} took a {colour} {obj} and was brave."),
            ("Soon both were safe at home.", "\"You were so brave,\" said {friend}."),
        ),
        (
            ("{hero} was afraid of many things.", "People said that {hero} was not brave at all."),
            ("Most of all, {he} was afraid of the dark cave near the {place}.", "{He} did not like the old house at the {place}."),
            ("One day, {friend} went in and did not come back.", "Then one night, {friend} called for help from inside."),
            ("\"Be brave,\" said {hero} and stood up.", "{hero} took a deep breath and wanted to be brave."),
            (None, "It was dark and cold, and water fell from above.", "Step by step, {he} went on."),
            ("{He} had only a {colour} {obj} in {his} hand.", "{He} held a {colour} {obj} tight."),
            ("There was {friend}, sitting {spot}.", "{hero} heard a soft voice, and it was {friend}."),
            ("\"Follow my {obj},\" said {hero}, and they walked out.", "{hero} gave the {obj} to {friend} and led the way."),
            ("\"You are the brave one now,\" said {friend}.", "From then on, everybody called {hero} brave."),
        ),
    ),
}  # fmt: skip

OPENINGS = (
    "Once upon a time, there was a {adj} {kind} named {hero}.",
    "Once upon a time, there was a {adj} {kind} named {hero} who lived near the {place}.",
    "Once upon a time, there was a {adj} {kind} called {hero} at the {place}.",
    "There once was a {adj} {kind} named {hero}.",
    "Once upon a time, near the {place}, there lived a {adj} {kind} named {hero}.",
    "In a small house by the {place} lived a {adj} {kind} named {hero}.",
)
FRIEND_LINES = (
    "{hero} had a good friend, {a_fkind} named {friend}.",
    "The best friend of {hero} was {friend}, {a_fkind}.",
    "Next door lived {friend}, {a_fkind} who liked {hero}.",
)
DAILY_LINES = (
    "The {place} was quiet, and the air was clear.", "{hero} liked to sing in the morning.", "{hero} liked warm bread with honey.",
    "Every day, {hero} walked to the {place}.", "The sun was high, and the birds sang.", "It was a fine day at the {place}.",
    "{hero} and {friend} often played at the {place}.", "In the evening, {hero} told {friend} about the day.",
)  # fmt: skip
NEXT_LINES = ("The next day, something new happened.", "A week later, the sun was out again.", "But that was not all.",
              "Some days later, {hero} was at the {place} again.", "Then winter came, and then spring.")  # fmt: skip
ENDINGS = (
    "And they lived happily ever after.", "From that day on, {hero} and {friend} were the best of friends.",
    "That night, {hero} fell asleep with a smile.", "{hero} was very {feeling}.", "And {hero} never forgot that day.",
    "The end.", "{hero} went home and told the family everything.", "Since then, {hero} and {friend} meet every day.",
)  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon", "Poland": "Warsaw", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Russia": "Moscow", "Cuba": "Havana",
    "Kenya": "Nairobi", "Peru": "Lima", "Canada": "Ottawa", "Belgium": "Brussels", "Hungary": "Budapest",
}  # fmt: skip
COLOUR_OF = {
    "the sky": "blue", "the grass": "green", "the sun": "yellow", "the snow": "white", "the night": "black", "a banana": "yellow",
    "a lemon": "yellow", "a cherry": "red", "a tomato": "red", "milk": "white", "a carrot": "orange", "the sea": "blue", "chocolate": "brown",
    "a flamingo": "pink", "a raven": "black", "a plum": "purple", "a leaf": "green", "coal": "black", "blood": "red", "a pumpkin": "orange",
}  # fmt: skip
SOUND_OF = {
    "a cow": "moo", "a dog": "woof", "a cat": "meow", "a duck": "quack", "a sheep": "baa", "a pig": "oink", "a horse": "neigh", "a lion": "roar",
    "a frog": "ribbit", "a bee": "buzz", "an owl": "hoot", "a snake": "hiss", "a rooster": "cluck", "a mouse": "squeak", "a bird": "tweet", "a wolf": "howl",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("fast", "slow"), ("day", "night"), ("happy", "sad"), ("open", "closed"),
    ("light", "dark"), ("old", "new"), ("good", "bad"), ("wet", "dry"), ("high", "low"), ("loud", "quiet"), ("full", "empty"),
    ("hard", "soft"), ("long", "short"), ("rich", "poor"), ("early", "late"), ("near", "far"), ("left", "right"),
)  # fmt: skip
GREETINGS = {
    "Hi": "Hello! Would you like to hear a story?", "Hello": "Hello! How are you today?", "Hey": "Hey! What can I do for you?",
    "Hi there": "Hello! It is nice to meet you.", "Good morning": "Good morning! I hope you slept well.",
    "Good night": "Good night! Sleep well.", "How are you?": "I am fine, thank you. How are you?",
    "Hi there, how are you doing today?": "I am doing fine, thank you. Would you like to hear a story?",
    "Hello, how are you?": "I am fine, thank you.", "Thank you": "You are welcome.", "Thanks": "You are welcome.",
    "Goodbye": "Goodbye! See you soon.", "Who are you?": "I am a small storyteller.", "What is your name?": "You can call me Storyteller.",
    "What can you do?": "I can tell stories, add small numbers and answer easy questions.", "Hello, world!": "Hello to you too!",
}  # fmt: skip

STORY_REQUESTS = (
    "Tell me a {length}story{about}.", "Please tell me a {length}story{about}.", "Can you tell me a {length}story{about}?",
    "I want to hear a {length}story{about}.", "Write a {length}story{about}.", "Make up a {length}story{about}, please.",
    "Give me a {length}story{about}.", "May I have a {length}story{about}?",
)  # fmt: skip
LEADS = ("", "", "Hi! ", "Hello! ", "I have a question. ", "Please help me. ")  # what may stand before a question
SUM_QUESTIONS = ("What is {a} + {b}?", "How much is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "What is {a} plus {b}?",
                 "Can you add {a} and {b}?", "What do you get when you add {b} to {a}?", "Tell me {a} + {b}.")  # fmt: skip
CAPITAL_QUESTIONS = ("What is the capital of {key}?", "Tell me the capital of {key}.", "Which city is the capital of {key}?",
                     "Do you know the capital of {key}?", "Name the capital of {key}.")  # fmt: skip
COLOUR_QUESTIONS = ("What colour is {key}?", "Tell me the colour of {key}.", "Which colour has {key}?",
                    "Do you know the colour of {key}?", "Name the colour of {key}.")  # fmt: skip
SOUND_QUESTIONS = ("What does {key} say?", "What sound does {key} make?", "Which sound comes from {key}?",
                   "Do you know what {key} says?", "How does {key} sound?")  # fmt: skip
OPPOSITE_QUESTIONS = ("What is the opposite of {key}?", "Tell me the opposite of {key}.", "Which word is the opposite of {key}?",
                      "Do you know the opposite of {key}?", "Name the opposite of {key}.")  # fmt: skip
REPEAT_REQUESTS = (
    "Repeat after me: {words}",
    "Say this again: {words}",
    "Please repeat: {words}",
    "Repeat these words: {words}",
)
