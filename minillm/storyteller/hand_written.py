"""What the evaluation asks that no generator made: openings of a story and requests, written by hand.

No opening is the beginning of a training text (a test looks), and no request with its words is one of `typed`.
"""

# ruff: noqa: E501 -- one opening a line

from typing import NamedTuple


class Opening(NamedTuple):
    """What somebody types, and what a good story does with it."""

    text: str
    hero: str = ""  # the word for whom it is about, a name or a kind; "" if it leaves that open
    verb: bool = False  # whether its last sentence has its verb already


OPENINGS = (
    # somebody
    Opening("The old wizard in the tower", "wizard"), Opening("A shy little dinosaur", "dinosaur"), Opening("The brave astronaut", "astronaut"),
    Opening("An elephant and a mouse", "elephant"), Opening("The princess who could not laugh", "princess"), Opening("The cat with the long tail", "cat"),
    Opening("A very small dog", "dog"), Opening("Two brothers and their sister"), Opening("The clever fox and the lazy bear", "fox"),
    Opening("A crocodile", "crocodile"), Opening("The baker's daughter", "daughter"), Opening("My big sister", "sister"),
    Opening("The last dragon on earth", "dragon"), Opening("Three hungry wolves"), Opening("The boy next door", "boy"),
    # a name
    Opening("Emma opened the old book and", "Emma", True), Opening("Tom and his dog", "Tom"), Opening("Lily cried because", "Lily", True),
    Opening("Sophia was bored", "Sophia", True), Opening("Alexander loved trains.", "Alexander", True), Opening("Max, the smallest rabbit of all,", "Max"),
    Opening("Mr. Fox was very hungry", "Fox", True), Opening("Uncle Joe came to visit", "Joe", True), Opening("Leo wished he could fly", "Leo", True),
    Opening("Anna never told anyone, but", "Anna", True),
    # when and where
    Opening("One rainy afternoon, a turtle", "turtle"), Opening("One day, a penguin decided to", "penguin", True),
    Opening("In the morning, Ben could not find his shoes.", "Ben", True), Opening("Last summer, we went to the sea", "", True), Opening("Deep in the ocean"),
    Opening("On top of the highest mountain"), Opening("In a kingdom by the sea"), Opening("At midnight, the toys"), Opening("On the moon"),
    Opening("In the year 3000"), Opening("Behind the waterfall there was", "", True), Opening("Before anyone was awake,"),
    Opening("On her way to school, Mia", "Mia"), Opening("Under my bed lives", "", True), Opening("Far across the ocean, there lived", "", True),
    Opening("In Paris, a boy", "boy"),
    # there was, it was
    Opening("There was a knock", "", True), Opening("There once was a king who", "king"), Opening("There were no more cookies", "", True),
    Opening("It was the coldest winter of all", "", True), Opening("It was snowing when", "", True), Opening("It all began when", "", True),
    Opening("It was Monday", "", True),
    # somebody speaks
    Opening("I have always wanted", "", True), Opening("When I was little", "", True), Opening("My grandmother told me that", "", True),
    Opening("You will not believe what", "", True), Opening("If I were a bird", "", True), Opening("Nobody knew why", "", True),
    Opening("Every evening, the lighthouse keeper", "keeper"), Opening("\"I do not want to go to bed,\" said the", "", True),
    Opening("\"Why are you crying?\" asked", "", True), Opening("\"Stop!\" cried the captain", "captain", True),
    Opening("Everyone laughed when the goose", "goose", True), Opening("She was the fastest runner in the village", "runner", True),
)  # fmt: skip

OTHER_OPENINGS = (  # by another hand, which had seen the list above and no grammar; looked at once before the last training
    # somebody
    Opening("A grumpy old goat", "goat"), Opening("A mermaid named Coralie", "Coralie"), Opening("The knight without a horse", "knight"),
    Opening("All the children in my street"), Opening("A robot made of spoons", "robot"), Opening("The postman", "postman"),
    Opening("The hedgehog, the owl and the badger", "hedgehog"), Opening("Our hamster Biscuit", "Biscuit"),
    Opening("the girl with no shadow", "girl"), Opening("Turbo the snail", "Turbo"), Opening("Nobody's favourite monster", "monster"),
    Opening("The oldest tortoise in the zoo", "tortoise"), Opening("A pirate afraid of water", "pirate"),
    Opening("Grandma and the giant pumpkin", "Grandma"), Opening("The twins"),
    # a name
    Opening("Noah planted a button in the garden.", "Noah", True), Opening("Little Amira", "Amira"),
    Opening("Mrs. Pumpernickel baked a cake so big that", "Pumpernickel", True), Opening("Oskar, who was only six,", "Oskar"),
    Opening("Princess Wilhelmina hated her crown.", "Wilhelmina", True), Opening("Captain Barnaby steered his ship", "Barnaby", True),
    Opening("Sam and Ella were best friends, until", "Sam", True), Opening("Dr. Whiskers", "Whiskers"),
    Opening("Yuki found a key in the snow", "Yuki", True), Opening("Poor Henry had the hiccups.", "Henry", True),
    Opening("Ravi's kite got stuck in a tree.", "Ravi", True), Opening("Can Zoe keep a secret?", "Zoe", True),
    # when and where
    Opening("On the night before Christmas, a reindeer", "reindeer"), Opening("A long, long time ago, when animals could talk,"),
    Opening("Yesterday my teacher turned into", "teacher", True), Opening("In a shoebox in the attic"),
    Opening("Somewhere in Africa, a young lion", "lion"), Opening("At the bottom of the well sat", "", True), Opening("Inside the clock"),
    Opening("Every Friday at five o'clock"), Opening("During the big storm, the smallest boat in the harbour", "boat"),
    Opening("It happened in London, on a foggy evening.", "", True), Opening("On planet Zog"),
    Opening("After lunch, Fatima and her cousin", "Fatima"), Opening("One morning Pablo woke up and he was invisible", "Pablo", True),
    Opening("Between two hills stood a crooked house.", "", True), Opening("On the first day of spring, a bumblebee", "bumblebee"),
    Opening("Beyond the desert, where the sand sings,"),
    # there was, it was
    Opening("once upon a time there was a unicorn that was allergic to glitter", "unicorn", True),
    Opening("There was once a kangaroo with only one shoe", "kangaroo", True), Opening("There was something in the soup", "", True),
    Opening("There are no monsters in our house, except", "", True),
    Opening("There lived in the forest a woodcutter and his wife.", "woodcutter", True), Opening("It was a dark and stormy night", "", True),
    Opening("It was my birthday and nobody came.", "", True), Opening("It smelled of pancakes", "", True),
    # somebody speaks
    Opening("\"Follow me,\" whispered the squirrel", "squirrel", True), Opening("\"Has anybody seen my nose?\" the snowman", "snowman"),
    Opening("\"Look, a rainbow!\" shouted Jack.", "Jack", True), Opening("Mum said, \"Never touch the red button.\"", "", True),
    Opening("I am a teapot and this is my story", "teapot", True), Opening("Today I met a ghost", "ghost", True),
    Opening("We were lost.", "", True), Opening("Have you ever heard of the invisible giraffe?", "giraffe", True),
    Opening("Suddenly the lights went out", "", True),
)  # fmt: skip

REQUESTS = (  # what the storyteller cannot do and does not know
    "Tell me a joke about cats", "Know any good jokes?", "Write a limerick about a shark.", "Sing me a lullaby.", "Who was the first man on the moon?",
    "What is the speed of light?", "How do I boil an egg?", "Which team won the cup?", "What is 17 + 25?", "What is 6 * 7?", "What is 9 minus 4?",
    "What is the capital of Bolivia?", "What is the capital of Thailand?", "What colour is a giraffe?", "What does a camel say?",
    "What is the opposite of generous?", "Tell me a story about a spaceship.", "Write a short story about zombies.", "Explain quantum mechanics.",
    "Write a Python function that sorts a list.", "Translate good morning into German.", "What is your favourite food?", "Are you a robot?",
    "Do you have feelings?", "What is the weather like in Hamburg?", "What time is it in New York?", "blah blah blah", "qwerty", "Je ne comprends pas.",
    "I lost my keys yesterday.", "Why do cats purr?", "How tall is the Eiffel Tower?", "When did the second world war end?", "Who painted the Mona Lisa?",
    "Give me five names for a hamster.", "Can you book a flight for me?", "Where can I buy cheap shoes?", "What is machine learning?",
    "Is pineapple good on pizza?", "Recommend a good film.",
)  # fmt: skip
