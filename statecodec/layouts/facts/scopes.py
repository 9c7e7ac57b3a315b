"""The weights that an optimizer's states may belong to: those of its file, its folder, and the folders around it."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from statecodec.layouts.facts.file_roles import FileRoles, WeightNode, Weights
from statecodec.layouts.facts.names import Candidate, models
from statecodec.layouts.facts.survey import ModelTensor, Survey

_MAX_ELSEWHERE: Final = 8
"""Models in other folders: many are many checkpoints side by side, none of which need be an optimizer's."""


@dataclass(frozen=True)
class Scopes:
    """The weights of all files of a checkpoint, by where they are."""

    files: list[FileRoles]
    surveys: list[Survey]
    """What each of the files holds."""

    def candidates(self, file: FileRoles) -> list[list[Candidate]]:
        """The models that a file's optimizers may be for, nearest first."""
        beside = self._folders[file.folder]
        elsewhere = [c for folder in self._folders.values() if folder is not beside for c in folder]
        return [self._models[file.path], beside, elsewhere if len(elsewhere) <= _MAX_ELSEWHERE else []]

    def weights(self, file: FileRoles, surveyed: Survey) -> Weights:
        """The weights that names of a file's parameters may mean: of several of one name the nearest."""
        around = (self._around.get(folder, {}) for folder in _upwards(file.folder))
        return ChainMap(_by_name(file, surveyed.weights), self._beside.get(file.folder, {}), *around)

    @cached_property
    def _models(self) -> dict[str, list[Candidate]]:
        """Each file's models."""
        pairs = zip(self.files, self.surveys, strict=True)
        return {file.path: models(surveyed.weights, file.facts.ordered) for file, surveyed in pairs}

    @cached_property
    def _folders(self) -> dict[str, list[Candidate]]:
        """Per folder: each file's models, and all files' weights together (a model in several shards)."""
        folders: dict[str, list[Candidate]] = defaultdict(list)
        for ordered in (True, False):
            shards: dict[str, list[ModelTensor]] = defaultdict(list)
            for file in self.files:
                candidates = self._models[file.path]
                folders[file.folder] += []
                if file.facts.ordered is ordered and candidates:
                    folders[file.folder] += candidates
                    shards[file.folder] += [w for c in candidates for w in c.weights]
            for folder, weights in shards.items():
                if len(weights) > max(len(c.weights) for c in folders[folder]):
                    folders[folder].append(Candidate(weights, ordered))
        return folders

    @cached_property
    def _of_files(self) -> dict[str, list[dict[str, WeightNode]]]:
        """For each folder the weights of each of its files."""
        folders: dict[str, list[dict[str, WeightNode]]] = defaultdict(list)
        for file, surveyed in zip(self.files, self.surveys, strict=True):
            folders[file.folder].append(_by_name(file, surveyed.weights))
        return folders

    @cached_property
    def _beside(self) -> dict[str, dict[str, WeightNode]]:
        """For each folder the weights in its files, whose names only one of them has."""
        return {folder: _unique(of_files) for folder, of_files in self._of_files.items()}

    @cached_property
    def _around(self) -> dict[str, dict[str, WeightNode]]:
        """For each folder the weights anywhere in it, whose names only one file has.

        Weights beside an optimizer belong to that optimizer, so they are left out.
        """
        pairs = zip(self.files, self.surveys, strict=True)
        trained = {file.folder for file, surveyed in pairs if surveyed.optimizers}
        inside: dict[str, list[dict[str, WeightNode]]] = defaultdict(list)
        for folder, of_files in self._of_files.items():
            for above in _upwards(folder) if folder not in trained else ():
                inside[above] += of_files
        return {folder: _unique(of_files) for folder, of_files in inside.items()}


def _upwards(folder: str) -> Iterator[str]:
    """The folder and those that it is in, up to the checkpoint's own."""
    while folder != ".":
        yield folder
        folder = folder.rpartition("/")[0] or "."
    yield folder


def _unique(several: Iterable[dict[str, WeightNode]]) -> dict[str, WeightNode]:
    """The weights whose names only one of several has."""
    union: dict[str, WeightNode] = {}
    twice: set[str] = set()
    for weights in several:
        twice |= weights.keys() & union.keys()
        union |= weights
    return {name: weight for name, weight in union.items() if name not in twice}


def _by_name(file: FileRoles, weights: Iterable[ModelTensor]) -> dict[str, WeightNode]:
    """A file's weights by name, without running averages; of several models the first."""
    by_name: dict[str, WeightNode] = {}
    for weight in weights:
        if file.roles[weight.node.index] == "weight":
            by_name.setdefault(weight.name, (file, weight.node))
    return by_name
