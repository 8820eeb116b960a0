"""Prompts that the package brings along: of the demo, short questions that invite an opinion or a
story, in plain English; and openings of stories, for a small model that knows nothing else."""

from prefloop.data import split
from prefloop.types import Comparison

TRAIN = (
    "What do you think of rainy Sundays?",
    "Tell me a two-sentence story about a lost dog.",
    "How would you describe the first day at a new school?",
    "What is your opinion of long train journeys?",
    "Write a short review of a small café.",
    "Tell me about a neighbour who plays the drums at night.",
    "What do you think of eating alone in a restaurant?",
    "Describe an old man feeding pigeons in the park.",
    "How do you feel about winter mornings?",
    "Write two sentences about a birthday that did not go as planned.",
    "What do you think of people who talk in the cinema?",
    "Describe the last hour of a working day.",
    "Tell a short story about a broken umbrella.",
    "What is your opinion of camping?",
    "Write a short review of a film you have just seen.",
    "How would you describe a crowded bus?",
    "What do you think of getting up early?",
    "Tell me about a cat that does not like visitors.",
    "Describe a storm over the sea.",
    "What do you think of learning to play the violin as an adult?",
    "Write two sentences about an exam.",
    "How do you feel about moving to another city?",
    "Tell a short story about two brothers and one bicycle.",
    "What is your opinion of homework?",
    "Describe a visit to the dentist.",
    "Write a short review of a hotel by the station.",
    "What do you think of surprise parties?",
    "Tell me about a letter that arrived too late.",
    "How would you describe the smell of an old library?",
    "What do you think of working from home?",
    "Write two sentences about a football match.",
    "Describe a garden in November.",
    "Tell a short story about a baker and a thief.",
    "What is your opinion of social media?",
    "How do you feel about growing older?",
    "Write a short review of a second-hand car.",
    "What do you think of spicy food?",
    "Describe a night in a tent during heavy rain.",
    "Tell me about a teacher you will not forget.",
    "What do you think of queueing?",
    "Write two sentences about a broken promise.",
    "How would you describe a hospital waiting room?",
    "Tell a short story about a lighthouse.",
    "What is your opinion of New Year's resolutions?",
    "Describe a small town after the factory has closed.",
    "Write a short review of a cooking class.",
    "What do you think of losing a game?",
    "Tell me about a journey that took much longer than expected.",
)
"""48 prompts to sample from and train on."""

HELD_OUT = (
    "What do you think of Mondays?",
    "Tell me a two-sentence story about an empty house.",
    "How would you describe a long flight?",
    "What is your opinion of cold showers?",
    "Write a short review of a bookshop.",
    "Tell me about a friend who is always late.",
    "What do you think of growing your own vegetables?",
    "Describe a child on a swing.",
    "How do you feel about thunderstorms?",
    "Write two sentences about a lost key.",
    "What do you think of noisy neighbours?",
    "Describe the morning after a party.",
    "Tell a short story about a broken clock.",
    "What is your opinion of museums?",
    "Write a short review of a pair of shoes.",
    "How would you describe a busy kitchen?",
    "What do you think of waiting for news?",
    "Tell me about a dog that is afraid of the sea.",
    "Describe a desert at noon.",
    "What do you think of writing letters by hand?",
    "Write two sentences about a goodbye at the station.",
    "How do you feel about public speaking?",
    "Tell a short story about three friends and a boat.",
    "What is your opinion of fast food?",
)
"""24 prompts that training never sees."""

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
OPENINGS = (
    "went to the park with",
    "found a big box for",
    "had a red ball and played with",
    "saw a dog near",
    "was sad because of",
    "wanted to bake a cake for",
    "lost a toy that belonged to",
    "heard a loud noise and ran to",
    "made a picture of",
    "sat under a tree with",
)


def story_prompts() -> tuple[list[Comparison], list[Comparison]]:
    """Openings of stories: to train on, and held out."""
    rows = [
        Comparison(prompt=f"One day, {name} {opening}", responses=(), id=f"{name}-{number}")
        for name in NAMES
        for number, opening in enumerate(OPENINGS)
    ]
    return split(rows, 0.4, 0)
