"""Judgements of people: a page on this machine, a database that loses none, comparisons out of it.

tasks    what is shown, in which order        store    the database
server   the page and its requests
"""

from prefloop.labelling.people import People
from prefloop.labelling.server import Labeller, serve
from prefloop.labelling.store import Store
from prefloop.labelling.tasks import Task, tasks_of

__all__ = ["Labeller", "People", "Store", "Task", "serve", "tasks_of"]
