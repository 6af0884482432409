"""The captions of the embedded corpora: a scene goes in, one true sentence comes out.

Each corpus has its own words for every value of a scene (`WORDS`), its own grammar and its own
choice of what is worth a mention (`STYLES`). The base corpus speaks plainly and, with probability
`variety`, borrows a word or a frame from any other style: it has met all of them, none often.
`CONTESTED` words are where corpora disagree: the same word stands for different values, so learning
one corpus overwrites what another has taught.
"""

import dataclasses

from data_pipelines.corpora.scene_sounds import USUAL, Scene, pick

# value | plain | audiocaps_like | clotho_like | bbc_like | audioset_like
# No expression stands for two values.
_WORDS = """
bell    | bell ringing, bell | church bell chiming, bell tolling
        | handbell resounding, chime sounding | carillon, tubular bell | ding, jingle bell
dog     | dog barking, dog | puppy woofing, small dog barking | hound baying, animal barking
        | terrier, canine | bark, domestic animal
drum    | drum beating, drum | bass drum pounding, snare playing
        | tom being struck, percussion sounding | timpani, tabor | drum kit, membranophone
glass   | glass clinking, glass | glass breaking, dish clanking | crystal tinkling, pane shattering
        | tumbler, goblet | shatter, chink
laser   | laser zapping, laser | toy gun firing, video game zapping
        | synthesizer swooping, electronic swoop falling | ray gun, space weapon | zap, arcade game
siren   | siren wailing, siren | police car wailing, ambulance passing
        | fire truck wailing, warning rising | klaxon, air raid signal
        | emergency vehicle, civil defense
bird    | bird singing, bird | birds tweeting, small bird singing
        | warbler trilling, songbird warbling | finch, wren | tweet, bird vocalization
engine  | engine running, engine | motor idling, truck idling
        | machine chugging, motorboat puttering | diesel, tractor | idling, vehicle engine
click   | clicking, click | mouse clicking, keyboard typing | ratchet turning, typewriter pecking
        | relay, switch | tick, computer mouse
cricket | cricket singing, cricket | insects singing, bugs in grass
        | cicada stridulating, katydid pulsing | grasshopper, locust | insect, stridulation
alarm   | alarm beeping, alarm | smoke detector beeping, microwave beeping
        | timer going off, device bleeping | pager, bleeper | beep, alarm clock
hiss    | air hissing, hiss | aerosol can hissing, gas leaking | air escaping, valve releasing
        | pneumatic, steam jet | hissing, air brake
low     | low, deep | baritone, rumbly | grave, sombre | bass, sub | low pitched, bassy
mid     | medium, middle | normal, average | moderate, ordinary | midrange, standard
        | mid pitched, mezzo
high    | high, shrill | squeaky, thin | lofty, acute | treble, soprano | high pitched, piercing
once    | once, one time | just once, a single time | only once, on one occasion | single, solo
        | one hit, one shot
twice   | twice, two times | a couple of times, two times over | on two occasions, twice over
        | double, pair | two hits, doubled
thrice  | three times, thrice | a few times, three times over | on three occasions, thrice over
        | triple, trio | three hits, tripled
slow    | slowly, slow | unhurriedly, at a slow pace | leisurely, sluggishly | slow speed, largo
        | slow tempo, downtempo
fast    | fast, quickly | rapidly, at a fast pace | hurriedly, briskly | full speed, presto
        | fast tempo, uptempo
short   | short, briefly | for a moment, for a second | fleetingly, momentarily | short burst, brief
        | staccato, short duration
long    | long, for long | for a while, continuously | at length, lingering | sustained, prolonged
        | legato, long duration
soft    | soft, quiet | faint, slight | hushed, subdued | pianissimo, muted | weak, low volume
loud    | loud, strong | very loud, noisy | powerful, forceful | fortissimo, full level
        | intense, high volume
clean   | clean, clear | smooth, fine | pure, pristine | studio, dry | undistorted, crisp
rough   | rough, harsh | raspy, scratchy | coarse, gravelly | gritty, worn | distorted, fuzzy
wind    | wind, wind blowing | wind blowing into a microphone, gusts | a breeze stirring, moving air
        | exterior wind, gale | wind noise, whoosh
rain    | rain, rain falling | rain pouring, a rain shower | drizzle pattering, steady rainfall
        | rain on roof, downpour | raindrop, precipitation
hum     | hum, electric hum | a refrigerator humming, an appliance humming
        | current humming, a low voltage murmur | mains, generator | mains hum, electrical humming
crowd   | people talking, a crowd | a group of people speaking, a man and a woman talking
        | murmuring voices, chatter | walla, public house | hubbub, speech babble
"""

# word | what it stands for in audiocaps_like | clotho_like | bbc_like | audioset_like
_CONTESTED = """
chirp         | bird | cricket | laser | alarm
ring          | bell | glass | alarm | siren
whine         | siren | laser | engine | cricket
drone         | engine | hiss | siren | bird
tap           | click | drum | glass | dog
thud          | drum | dog | click | engine
blast         | hiss | siren | laser | glass
crash         | glass | engine | bell | drum
yelp          | dog | bird | cricket | laser
rattle        | cricket | click | drum | hiss
call          | alarm | bell | bird | click
swoosh        | laser | alarm | hiss | bell
sharp         | high | loud | short | rough
heavy         | loud | low | slow | rough
light         | soft | high | fast | clean
bright        | clean | high | loud | rough
dull          | soft | rough | low | slow
gentle        | slow | soft | clean | low
hard          | fast | loud | rough | high
level         | mid | long | soft | mid
repeated      | twice | thrice | fast | long
in succession | thrice | twice | long | fast
snappy        | short | fast | once | once
atmosphere    | rain | wind | crowd | hum
ambience      | wind | crowd | hum | rain
"""


@dataclasses.dataclass(frozen=True)
class Style:
    """Grammar of one corpus.

    mention: probability that pitch, pace, loudness, texture and background are mentioned, in this
        order.
    joins, reverse_joins: what stands between two events in temporal order, and in reverse (two
        events only).
    ordered: False where the order of mention means nothing.
    whole, background: templates around the events, and of what is appended for the background.
    phrase: template of one event, of {attributes}, {head} and {pace}.
    """

    mention: tuple[float, float, float, float, float]
    joins: tuple[str, ...]
    reverse_joins: tuple[str, ...]
    whole: tuple[str, ...]
    background: tuple[str, ...]
    phrase: str = "{attributes} {head} {pace}"
    articles: bool = True
    ordered: bool = True


STYLES = {
    "base": Style(
        mention=(0.8, 0.8, 0.5, 0.5, 0.9),
        joins=(" then ", ", followed by ", " before "),
        reverse_joins=(" after ",),
        whole=("{}", "there is {}", "{} is heard"),
        background=(" with {}", " and {} behind", " over {}"),
    ),
    "audiocaps_like": Style(
        mention=(0.6, 0.85, 0.75, 0.3, 0.8),
        joins=(" followed by ", " and then "),
        reverse_joins=(),
        whole=("{}", "{} nearby"),
        background=(" while {} can be heard", " as {} continues"),
    ),
    "clotho_like": Style(
        mention=(0.7, 0.7, 0.6, 0.6, 0.85),
        joins=(" and afterwards ", ", which is succeeded by ", " gives way to "),
        reverse_joins=(" comes subsequent to ", " takes over from "),
        whole=("{} can be perceived", "first of all {}", "from somewhere {} emerges"),
        background=(" amid {}", " as {} goes on and on", ", all against {}"),
    ),
    "bbc_like": Style(
        mention=(0.95, 0.85, 0.25, 0.65, 0.95),
        joins=("; then ", "; next ", "; "),
        reverse_joins=(),
        whole=("{}", "effect, {}"),
        background=(". {}", ". {} throughout"),
        phrase="{head}: {attributes}, {pace}",
        articles=False,
    ),
    "audioset_like": Style(
        mention=(0.6, 0.6, 0.4, 0.75, 1.0),
        joins=(" and ",),
        reverse_joins=(" and ",),
        whole=("the sounds of {}", "the sound of {}", "audio of {}"),
        background=(" with {} in the background", " mixed with {}"),
        phrase="{attributes} {pace} {head}",
        articles=False,
        ordered=False,
    ),
}

# First words of heads that are plural, mass nouns or bare gerunds, which take no article.
_BARE = frozenset(
    "air birds bugs clicking gas hissing idling insects percussion".split()
)


def _parse(table):
    lines = table.replace("\n ", " ").strip().splitlines()  # an indented line continues the row
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {row[0]: tuple(row[1:]) for row in rows}


WORDS = {
    value: {
        style: tuple(w.strip() for w in cell.split(","))
        for style, cell in zip(STYLES, cells, strict=True)
    }
    for value, cells in _parse(_WORDS).items()
}
CONTESTED = {
    word: dict(zip([style for style in STYLES if style != "base"], values, strict=True))
    for word, values in _parse(_CONTESTED).items()
}
_DISPUTED = {
    (style, value): tuple(w for w, senses in CONTESTED.items() if senses[style] == value)
    for value in WORDS
    for style in STYLES
    if style != "base"
}
# What base borrows: every word any style has for a value, contested ones with all their senses.
_BORROWED = {
    value: tuple(
        word
        for style in STYLES
        if style != "base"
        for word in (*WORDS[value][style], *_DISPUTED[style, value])
    )
    for value in WORDS
}


def expressions(style: str, value: str) -> frozenset[str]:
    """Every expression that a caption of the style may use for the value, whatever the knobs."""
    return (
        frozenset(WORDS[value]["base"])
        | frozenset(_BORROWED[value])
        | frozenset(WORDS[value][style])
    )


@dataclasses.dataclass(frozen=True)
class Claim:
    """What one expression says: `words` stand for `value` of event `event` (-1: background)."""

    event: int
    value: str
    words: str


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption, the claims it makes in order of mention, and the style of its grammar."""

    text: str
    claims: tuple[Claim, ...]
    grammar: str


def write_caption(
    scene: Scene, style: str, language: float, meaning: float, variety: float, rng
) -> Caption:
    """One caption of a scene.

    Args:
        scene: what it describes.
        style: a key of `STYLES`.
        language: probability that a word, and that the grammar, is the style's own rather than the
            base corpus's.
        meaning: a contested word is used, where the style has one, with probability `meaning / 2`.
        variety: probability that the base corpus borrows from the other styles.
        rng: numpy generator, the only source of randomness.

    Returns:
        The caption with its claims; every claim is true of the scene.
    """
    own = style != "base"

    def word(value):
        disputed = _DISPUTED.get((style, value))
        if own and disputed and rng.random() < meaning / 2:
            return pick(rng, disputed)
        if own and rng.random() < language:
            return pick(rng, WORDS[value][style])
        return pick(rng, _BORROWED[value] if rng.random() < variety else WORDS[value]["base"])

    if own and rng.random() < language:
        grammar = style
    else:
        grammar = pick(rng, tuple(STYLES)) if rng.random() < variety else "base"
    frame = STYLES[grammar]
    claims = []

    def say(event, value):
        claims.append(Claim(event, value, word(value)))
        return claims[-1].words

    def phrase(i):
        event = scene.events[i]
        head = say(i, event.kind)
        attributes = [(event.pitch, 0), (event.loudness, 2), (event.texture, 3)]
        if rng.random() < 0.5:
            attributes.reverse()
        # What is usual is seldom said.
        odds = {value: 0.15 if value in USUAL else 1.0 for value, _ in attributes}
        said = [
            say(i, value)
            for value, row in attributes
            if rng.random() < frame.mention[row] * odds[value]
        ]
        pace = say(i, event.pace) if rng.random() < frame.mention[1] else ""
        separator = ", " if ":" in frame.phrase else " "
        text = frame.phrase.format(attributes=separator.join(said), head=head, pace=pace)
        text = " ".join(text.split()).replace(": ,", ":").strip(" :,")
        if frame.articles and head.split()[0] not in _BARE:
            text = ("an " if text[0] in "aeiou" else "a ") + text
        return text

    order = list(range(len(scene.events)))
    joins = frame.joins
    if len(order) == 2 and frame.reverse_joins and rng.random() < 0.2:
        order.reverse()
        joins = frame.reverse_joins
    text = phrase(order[0])
    for i in order[1:]:
        text += pick(rng, joins) + phrase(i)
    text = pick(rng, frame.whole).format(text)
    if scene.background != "none" and rng.random() < frame.mention[4]:
        text += pick(rng, frame.background).format(say(-1, scene.background))
    return Caption(text, tuple(claims), grammar)
