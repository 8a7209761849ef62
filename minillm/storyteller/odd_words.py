"""Words that stand for all that people may type: by part of speech, none of them chosen because the model should know it.

The training text reads an odd word and never learns it. Some words of the corpus are among them, as in what people type;
those are learned.
"""

# ruff: noqa: E501, SIM905 -- a list of words is one text

import random
import re

from minillm.storyteller import vocabulary as words

NOUNS = """
    acorn airport album alley alphabet anchor answer apron arrow attic aunt autumn bakery balcony balloon bandage barrel bath
    battle bathroom beak beard bicycle biscuit blossom bone boots bottle bowl brain branch breakfast bridge broom brush bubble building
    bus butter cabin cable cactus camera camp candle candy canoe canyon carpet carriage cart castle cathedral cave ceiling cellar chain
    chair chalk cheese chess chicken chimney chocolate church cinema circle circus city cliff coat coffee comet computer cookie
    corner corridor cottage cotton couch cousin crayon cream crowd cupboard curtain cushion dance danger dawn desk dinner
    dishes distance doctor dream dress dust ear earth echo egg elbow elevator energy engine envelope eye face factory fairground
    family fence festival field finger fire fireplace fish flag floor flour fog football fork fountain friendship fruit furniture future
    galaxy game garage ghost glacier glass glue gold grandmother grape grass guitar hair hall hand harvest hay heart heat helicopter
    highway history holiday homework honey hospital hotel hour ice idea ink jacket jam jelly jewel joke journey juice jungle
    kettle kitchen knee knife knock knot lake language laughter law leaf leg lemon lesson letter library light lightning line lips list
    luck lunch luggage machine magic magnet medal medicine melody memory message metal midnight milk minute money monster month
    morning motor moustache mouth mud music mystery nail name neck needle neighbour nest net news newspaper noise nose notebook number
    ocean office oil onion orange orchestra oven page paint painting palace pan parcel path peace pepper phone photo piano picture pie pipe
    pizza planet plate platform playground pocket poem poison pond pool potato power present prison promise pumpkin puddle question
    quilt radio railway raft rainbow reason recipe restaurant rice riddle rock rocket roof room root rug rumour saddle sail salad salt sandwich
    sand school science screen secret shadow shelf shield ship shop shore shoulder shower sign silence sink skin skirt sleep smell
    smoke snow soap sock sofa soup space spice spring square stairs stamp station statue steam stick stomach storm stove street string
    sugar suitcase summer sunrise sunset supper surprise swamp swing sword tail tale tea telephone television tent test theatre thumb
    thunder ticket tiger time toast tomato tooth tower town toy tractor trail travel tray trick trouble truck trumpet truth tunnel twin
    uniform universe valley vase vegetable view village voice volcano wall war wardrobe water waterfall wave weather wedding week weekend wheel
    wind window wing winter wish wood wool word work workshop world worm yard year yoghurt zoo
""".split()  # fmt: skip
KINDS = """
    alien alligator ant architect artist badger baker banker barber bat beaver beetle blacksmith boxer     butcher butterfly camel carpenter caterpillar chef chicken child chimpanzee clown cobbler cook cousin crab crow
    cyclist dancer deer dentist detective diver doctor dolphin donkey dove dwarf eagle eel engineer explorer falcon farmhand
    ferret firefly flamingo flea florist fly gardener gazelle gecko giraffe goblin gnome gorilla grasshopper
    guard guest gull hamster hawk hermit hero heron hippo hunter inventor jaguar jellyfish jester judge juggler kangaroo kid kitten koala
    ladybird lawyer leopard lizard llama lobster magician mayor mechanic merchant miller miner mole moose mosquito moth
    musician neighbour nurse octopus ogre ostrich otter ox painter panda panther parrot peacock pelican pianist pigeon pilot
    plumber poet pony porcupine porter prisoner professor puma puppy raccoon rat raven reindeer rhino salmon
    scientist seagull seal servant shark shepherd shopkeeper singer skunk sloth snail soldier sparrow spy squid stork stranger student swan
    swimmer swordfish tailor thief toad toddler tourist traveller troll turkey twin vampire walrus warrior wasp weasel
    werewolf wombat woodpecker worker writer yak zebra zombie
""".split()  # fmt: skip
PLURALS = """
    acorns animals apples ants bananas bees berries books boots bottles boxes branches brothers bubbles bugs cakes candles cars carrots cats
    chairs cherries chickens children clouds clowns coins colours cookies cousins cows crows cups dancers days dinosaurs dishes dogs dolls
    dragons dreams drums ducks eggs elephants elves eyes fairies farmers fires fish flags flowers foxes friends games ghosts giants girls
    goats gloves grapes guests hats hens heroes hills horses hours houses ideas insects islands jokes kings kites knights ladies lamps
    leaves lemons letters lights lions lizards machines maps mice men miles minutes mistakes monkeys monsters months moons mothers
    mushrooms nails neighbours nights noodles nuts oranges owls pages pancakes parents peas pencils penguins people pets pirates planets plants
    plates ponies potatoes presents princesses questions rabbits rats ravens ribbons rings rivers robots rocks roses rules sailors
    secrets shadows sheep shells ships shoes sisters snakes soldiers songs spiders squirrels stairs stars steps stones stories strangers
    sweets teachers tears teeth thieves tigers toys trains travellers trees trucks trumpets turtles twins umbrellas vegetables
    wheels whales windows wings winters wishes witches wolves women words worms years
""".split()  # fmt: skip
PAST = """
    accepted admired allowed announced answered appeared argued arrived avoided baked barked became begged believed blamed blinked blushed
    boiled borrowed bounced bowed brushed built bumped buried burned bought called captured carved caught changed chased cheered
    chose cleaned climbed collected combed complained confessed cooked copied coughed counted covered crawled crept crossed
    decided decorated defended described destroyed disappeared discovered disliked dived dragged drank dreamed dressed drew dried
    dropped drove dug earned emptied enjoyed entered escaped examined explained explored failed fainted fed fetched fixed floated
    followed forgave forgot fought froze gathered giggled glanced grabbed greeted grew growled grumbled guarded guessed hated
    hid hoped howled hummed hunted hurried ignored imagined invented invited joined juggled jumped kept kicked kissed knitted knocked
    landed lay learned leaned left lent lifted lit listened locked longed lowered managed marched married melted
    mended missed mixed moved mumbled murdered needed nodded noticed obeyed offered ordered owned packed painted passed paid performed
    picked planned planted pointed polished poured practised prayed prepared pressed pretended promised protected pulled punished pushed
    raced raised reached read realised refused remembered repaired repeated replied rescued rested returned roared robbed rode rolled
    rowed rubbed rushed sailed saved scared scratched screamed searched sent served shivered shone shouted shook sighed skated skipped
    slid slipped sneezed sniffed snored sold spelled spent spilled splashed spoke spread stared started stayed stole stretched studied stumbled
    swallowed swam swept swung talked tasted taught teased tickled tied tore touched trained travelled trembled tripped trusted turned
    twisted typed understood unpacked used vanished visited waited warned washed wasted watched watered waved whispered whistled wiped
    wondered worked worried wrapped wrote yawned yelled
""".split()  # fmt: skip
BASE = """
    answer argue bake bark become beg believe bite blow borrow bounce bow breathe bring brush build burn buy call camp carry catch change
    chase cheer choose clap clean climb close collect complain cook cough count crawl cross cry dance decide deliver describe
    dig disappear discover dive draw dream dress drink drive drop earn eat enjoy enter escape explain explore fail fall feed feel
    fight fill fix float fly follow forget forgive freeze gather giggle grow growl guess hate hear hide hop hope howl hug hunt
    hurry imagine invent invite join joke juggle jump keep kick kiss knit knock know laugh lead learn leave lend lie lift listen live
    lock lose marry meet melt mend mix move need obey offer open order paint pass pay pick plan plant point pour practise pray pretend promise
    protect pull push quit race reach read relax remember repair repeat rescue rest return ride roar roll row rule run rush sail save
    scare scream search sell send serve share shine shout show sigh sit skate ski skip smell smile sneeze snore speak spell spend
    spin stand stare start stay steal stop study surf swallow swim swing talk taste teach tease tell think throw tickle touch train travel
    try turn understand use vanish visit wait wake wander warn wash watch wave wear whisper whistle win wish wonder work worry write yawn yell
""".split()  # fmt: skip
ADJECTIVES = """
    absent adventurous amazing ancient angry annoyed anxious asleep awake awful bald bare beautiful bitter blind blond bold bored bossy bright
    broken bumpy busy careful careless charming cheap chubby clean clumsy cold comfortable cool crazy creepy crooked crowded cruel
    cute damp dangerous dead deaf deep delicious different difficult dirty dizzy dry dusty eager early easy eastern elegant embarrassed
    empty endless enormous evil excellent excited expensive extra faint fair faithful famous fancy fat favourite fearless fierce final
    flat fluffy foggy foolish forgetful fragile free fresh frightened frosty frozen full furious fuzzy generous gentle ghostly giant
    gifted gigantic gloomy golden gorgeous graceful grateful greedy grumpy handsome hard harmless heavy helpful hidden honest horrible
    huge humble icy ill impatient important impossible invisible jealous jolly joyful juicy large last late light local long loud lovely loyal
    lucky mad magic magical magnificent mean messy mighty modern muddy mysterious narrow nasty naughty neat nervous new nice noble
    noisy northern nosy ordinary orphan pale patient peaceful perfect picky plain playful pleasant pleased polite popular pretty private
    puzzled quick rainy rare ready real restless rough round royal rude rusty salty scared scary secret selfish serious sharp shiny short
    sick silent silly simple skinny sleepy slim slippery smart smelly smooth snowy soft sore sour special spicy spooky spotted stale starving
    steep sticky stormy stout striped strong stubborn stupid sudden sunny sweet talented tame tasty terrible terrified thick thin thirsty
    thoughtful timid tough tricky true ugly unhappy unknown unlucky unusual upset useful useless warm weak wealthy wet wicked wide wild
    windy wonderful wooden worried worst wounded wrong youngest
""".split()  # fmt: skip
ADVERBS = """
    again almost already always angrily anxiously awkwardly badly barely blindly bravely calmly carefully carelessly certainly clearly clumsily
    completely constantly eagerly easily eventually everywhere exactly finally fiercely foolishly forever frequently gently gladly gracefully greedily
    happily hardly heavily honestly however hungrily immediately indeed instead kindly lately loudly luckily madly maybe mostly nearly nervously
    never nicely obviously occasionally often once only outside patiently perfectly perhaps politely probably proudly quickly quietly rarely
    really sadly secretly seldom sharply shyly silently simply sleepily slowly softly sometimes somewhere soon still strangely suddenly surely
    sweetly terribly together twice usually warmly weakly wildly wisely wonderfully
""".split()  # fmt: skip
HER_NAMES = """
    Abigail Ada Agnes Aisha Amelia Amy Andrea Angela Anita Annabelle Astrid Audrey Barbara Beatrice Bella Bertha Betty Bianca Bridget Camilla
    Carla Carmen Caroline Catherine Cecilia Charlotte Chloe Christina Claire Claudia Cora Cynthia Dana Daphne Deborah Diana Donna Dora Doris
    Dorothy Edith Eleanor Elena Elizabeth Eloise Emily Erica Esther Eva Evelyn Faith Fatima Fiona Flora Frances Frida Gabriela Georgia Gloria
    Grace Greta Gwen Hannah Harriet Hazel Heather Heidi Helen Holly Ingrid Irene Iris Isabella Jane Janet Jasmine Jennifer Jessica Joan Josephine
    Joyce Judith Julia Juliet Karen Kate Kathleen Kayla Laura Layla Leah Lena Linda Louise Lola Mabel Madeleine Maggie Margaret Maria Marie
    Martha Mary Matilda Melanie Melissa Michelle Mildred Molly Monica Nadia Nancy Naomi Natalie Natasha Nina Olive Olivia Paula Penelope Phoebe
    Polly Priya Rachel Rebecca Rita Rosalie Rosemary Ruth Sally Samantha Sandra Selma Shirley Sofia Stella Susan Sylvia Tessa Tina Ursula
    Valerie Vera Victoria Violet Vivian Wanda Wendy Winnie Yara Yasmin Yuki Yvonne Goldie Cinderella Rapunzel Snowy
""".split()  # fmt: skip
HIS_NAMES = """
    Aaron Ahmed Albert Alan Alfred Ali Andrew Anthony Anton Archie Arnold Arthur Barney Benjamin Bernard Bob Boris Brian Bruce Carl Carlos Charles
    Charlie Chen Chris Christopher Clarence Colin Conrad Daniel Darius Dennis Derek Diego Dominic Donald Douglas Duncan Dylan Edgar Edward Edwin Elias
    Eli Elliot Emil Eric Ernest Ethan Eugene Fabian Francis Frank Fred Frederick Gabriel Gary George Gerald Gilbert Gordon Graham Gregory Gus Hans Harold
    Harry Harvey Hassan Hector Henry Herbert Herman Howard Hubert Ian Igor Isaac Ivan Jacob James Jason Jasper Jeffrey Jeremy Jerry Jim Jimmy Johnny Jonas
    Jonathan Jordan Jose Joseph Joshua Juan Julian Justin Karl Keith Kevin Kurt Lars Laurence Leonard Lewis Liam Logan Louis Lucas Luke Marco Marcus Mario
    Mark Martin Mason Matthew Maurice Michael Miguel Mike Milo Mohammed Nathan Neil Nelson Nicholas Nick Nigel Oliver Oswald Otis Pablo Patrick Paul Pedro
    Percy Philip Pierre Quentin Ralph Ramon Raymond Rex Richard Robert Robin Rodney Roger Roland Roman Ron Rufus Samuel Scott Sebastian Simon Stanley Stefan
    Stephen Steve Steven Stuart Sven Ted Terry Thomas Timothy Toby Tony Victor Vincent Walter Wesley Wilbur Will William Winston Zachary Merlin Pinocchio
""".split()  # fmt: skip
CALLED = {  # what may stand before a name
    "he": "Mr. Uncle King Prince Captain Doctor Old Grandpa Sir Little Big Poor".split(),
    "she": "Mrs. Aunt Queen Princess Miss Captain Doctor Old Grandma Lady Little Poor".split(),
}
TIMES = """
    afternoon autumn bedtime breakfast Christmas dawn dinner dusk Easter evening hour lunch midnight month moment night noon spring sunset time
    weekend week year January February March April May July August September October November December Monday Tuesday Wednesday
    Thursday Friday Saturday Sunday
""".split()  # fmt: skip
LANDS = """
    Africa America Asia Australia Berlin Boston Brazil Cairo Canada Chicago China Delhi Denmark Egypt England Europe France Germany Greece Iceland India
    Ireland Italy Japan Kenya Lisbon London Madrid Mexico Moscow Norway Oslo Poland Rome Russia Scotland Spain Sweden Sydney Texas Tokyo Turkey Venice
    Vienna Wonderland
""".split()  # fmt: skip
OTHERS = """
    about against all although another anybody anyone anything because behind between both during each either else enough ever every everyone
    everything except few from half how into itself just least less many more most much neither nobody none nothing now off other our
    ourselves quite rather same several since somebody someone something such than that themselves these this those though through till too towards
    until upon very what whatever when where whether which while who whole whose why within without yes yet
    Einstein Shakespeare Mozart Napoleon Caesar Newton Darwin Google Amazon Tesla Batman Superman Disney
    python javascript algebra gravity physics poetry grammar internet website email password keyboard cache token batch attention
    explain describe translate summarise compare calculate solve list define prove recommend suggest
""".split()  # fmt: skip
SYLLABLES = "ba be bo da di fo ga glo go ka ki lo lu ma mi mo na ne ni pa po ra ri ro sa shi so ta ti tra ver wo xi zan zo".split()
KNOWN = {  # words of the corpus that stand in the same places; they are learned
    "n": (*words.ANIMALS, *words.OBJECTS[:20], *words.PLACES, *"tower house door window tree wall gate sky sun rain snow song cake bread apple paper moon "
          "water flower seed storm bird night road bed table story friend mother father sister brother bag tear hand foot day man king queen treasure "
          "piece gift race picnic knock step log hole leaf bench corner birthday prize judge flag".split()),
    "kind": (*words.ANIMALS, "sister", "brother", "grandfather", "mother", "friend", "bird", "king", "man"),
    "ns": "friends children rabbits bears cats dogs birds mice animals people brothers sisters apples flowers stories shoes toys babies ants rocks".split(),
    "v": "laughed smiled cried sang danced waited slept ran played helped fell stood jumped stopped walked woke sat tried".split(),
    "vt": "saw found liked loved lost took wanted heard helped thanked hugged brought carried opened made ate met".split(),
    "b": "play sing go sleep dance run laugh help wait see find come look share give speak cry win fly visit".split(),
    "a": ("little", "small", "big", "old", "tiny", "brave", "happy", "sad", "hungry", "tired", "lonely", "lost", "afraid", "cold", "quiet", "alone", "young",
          "sorry", "bored", "tall", "slow", "fast", "wet", "good", "bad", "funny", "dark", "safe", "proud", "glad"),
}  # fmt: skip
LISTS = {
    "n": NOUNS, "kind": KINDS, "ns": PLURALS, "v": PAST, "vt": PAST, "b": BASE, "a": ADJECTIVES, "adv": ADVERBS, "time": TIMES, "land": LANDS,
    "odd": NOUNS + PLURALS + PAST + BASE + ADJECTIVES + ADVERBS + OTHERS,
}  # fmt: skip
ENDINGS = {
    "n": ("", "", "n", "er", "t"), "kind": ("", "", "n", "er", "x"), "ns": ("s", "s", "ns"), "v": ("ed",), "vt": ("ed",), "b": ("", "n", "t"),
    "a": ("y", "ful", "ish", "al", "less"), "adv": ("ly",), "odd": ("", "", "n", "s", "ed", "ing", "er"),
}  # fmt: skip
ALL = frozenset(word for one in LISTS.values() for word in one)
CORPUS = frozenset(  # words of its sentences, whatever part of speech they have there
    re.findall(
        r"[a-z]+",
        " ".join(
            sentence or ""
            for beats in (
                *(beat for plot in words.PLOTS.values() for beat in (*plot.short, *plot.full)),
                words.OPENINGS, words.FRIEND_LINES, words.DAILY_LINES, words.NEXT_LINES, words.ENDINGS, words.SPOTS,
            )
            for sentence in beats
        ).lower(),
    )
)  # fmt: skip


def draw(rng: random.Random, part: str, known: float = 0.15) -> tuple[str, bool]:
    """(a word of this part of speech, whether it is one of the corpus): of the lists, of syllables, rarely of letters."""
    if part in KNOWN and rng.random() < known:
        return rng.choice(KNOWN[part]), True
    if part not in ENDINGS or rng.random() < 0.75:
        word = rng.choice(LISTS[part])
        return word, word in CORPUS
    if rng.random() < 0.75:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) + rng.choice(ENDINGS[part]), False
    letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))
    return letters + (ENDINGS[part][0]), False


def name(rng: random.Random, he: str) -> str:
    """A name that is none of the corpus's, for "he" or "she"."""
    if rng.random() < 0.75:
        return rng.choice(HIS_NAMES if he == "he" else HER_NAMES)
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).title()
