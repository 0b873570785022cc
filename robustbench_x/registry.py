"""The catalogue of everything that can be named: attacks, defences, hardenings, encoders, heads, data.

First-party plugins come through the same entry points as anyone's. A plugin that fails stops the run, with
its entry point and distribution named: a missing attack would otherwise look like robustness.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, final

from robustbench_x.data.dataset import DataSource
from robustbench_x.encoders.source import EncoderSource
from robustbench_x.errors import PluginError, UnknownNameError
from robustbench_x.hardening import HardeningSpec, check_hardening
from robustbench_x.heads.base import HeadSpec
from robustbench_x.plugin import AttackSpec, DefenseSpec, check_spec

__all__ = ["GROUP", "Registry", "Table", "load_registry"]

GROUP = "robustbench_x.plugins"
T = TypeVar("T")


@final
class Table(Mapping[str, T], Generic[T]):
    """Names to specs of one kind, in the order they were registered, with who registered them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, spec: T, *, origin: str) -> None:
        """Registers `spec`; the first owner of a name is never overwritten.

        Raises:
            PluginError: The name is taken.
        """
        if name in self._entries:
            raise PluginError(f"{self.kind} '{name}' from {origin} is already registered by {self._origins[name]}")
        self._entries[name] = spec
        self._origins[name] = origin

    def origin(self, name: str) -> str:
        """The distribution that registered `name`."""
        self[name]
        return self._origins[name]

    def __getitem__(self, name: str) -> T:
        """The spec called `name`; UnknownNameError lists near matches."""
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@final
class Registry:
    """Six tables. A plugin's `register(registry)` calls the `add_*` methods."""

    def __init__(self) -> None:
        self.attacks: Table[AttackSpec] = Table("attack")
        self.defenses: Table[DefenseSpec] = Table("defense")
        self.hardenings: Table[HardeningSpec] = Table("hardening")
        self.encoders: Table[EncoderSource] = Table("encoder source")
        self.heads: Table[HeadSpec] = Table("head")
        self.data: Table[DataSource] = Table("data source")
        self._origin = "robustbench-x"

    def add_attack(self, spec: AttackSpec) -> None:
        """Registers an attack; PluginError when it is malformed or its name is taken."""
        _check_type("add_attack", spec, AttackSpec)
        check_spec(spec)
        if spec.name in self.hardenings:
            raise PluginError(f"attack '{spec.name}': a hardening has this name already; choose another")
        self.attacks.add(spec.name, spec, origin=self._origin)

    def add_defense(self, spec: DefenseSpec) -> None:
        """Registers a defence; PluginError when it is malformed or its name is taken."""
        _check_type("add_defense", spec, DefenseSpec)
        check_spec(spec)
        self.defenses.add(spec.name, spec, origin=self._origin)

    def add_hardening(self, spec: HardeningSpec) -> None:
        """Registers a hardening; PluginError when it is malformed or its name is taken, by an attack too."""
        _check_type("add_hardening", spec, HardeningSpec)
        check_hardening(spec, self.attacks)
        self.hardenings.add(spec.name, spec, origin=self._origin)

    def add_encoder(self, source: EncoderSource) -> None:
        """Registers a scheme that encoders load by; PluginError when it is malformed or taken."""
        _check_type("add_encoder", source, EncoderSource)
        _check_word("encoder source", source.scheme)
        self.encoders.add(source.scheme, source, origin=self._origin)

    def add_head(self, spec: HeadSpec) -> None:
        """Registers a kind of head; PluginError when it is malformed or its name is taken."""
        _check_type("add_head", spec, HeadSpec)
        _check_word("head", spec.name)
        self.heads.add(spec.name, spec, origin=self._origin)

    def add_data(self, source: DataSource) -> None:
        """Registers a scheme that data sets open by; PluginError when it is malformed or taken."""
        _check_type("add_data", source, DataSource)
        _check_word("data source", source.scheme)
        self.data.add(source.scheme, source, origin=self._origin)

    def load(self, register: Callable[["Registry"], None], *, origin: str, title: str = "") -> None:
        """Runs a plugin's `register`; what it adds comes from `origin`, and its failures are named after `title`.

        Raises:
            PluginError: The plugin raised, or registered something malformed.
        """
        previous, self._origin = self._origin, origin
        title = title or origin
        try:
            register(self)
        except PluginError as error:
            raise PluginError(f"plugin {title}: {error}") from error
        except (Exception, SystemExit) as error:  # a plugin that leaves must not end an audit with its own code
            raise PluginError(f"plugin {title} failed to register: {type(error).__name__}: {error}") from error
        finally:
            self._origin = previous


def _check_type(method: str, spec: object, wanted: type) -> None:
    if not isinstance(spec, wanted):
        raise PluginError(f"{method} takes a {wanted.__name__}, got {type(spec).__name__}")


def _check_word(kind: str, name: str) -> None:
    if not name or name.split() != [name] or ":" in name:
        raise PluginError(f"{kind} '{name}': a name is one word without spaces or colons")


@functools.cache
def load_registry() -> Registry:
    """Everything installed here: the built-in encoders, heads and data, then every plugin package.

    Raises:
        PluginError: A plugin package is broken; it must be fixed or uninstalled first.
    """
    from robustbench_x.builtin import register_builtins

    registry = Registry()
    register_builtins(registry)
    for entry in _plugins():
        owner = entry.dist.name if entry.dist else "an unknown distribution"
        origin = f"{owner} (entry point {entry.name} = {entry.value})"
        try:
            register = entry.load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"plugin {origin} cannot be imported: {type(error).__name__}: {error}; "
                f"fix it or run: pip uninstall {owner}"
            ) from error
        registry.load(register, origin=owner, title=origin)
    return registry


def _plugins() -> list[EntryPoint]:
    # First-party first; a checkout installed twice over lists an entry point twice.
    found = {(entry.name, entry.value): entry for entry in entry_points(group=GROUP)}
    return sorted(found.values(), key=lambda e: ((e.dist.name if e.dist else "") != "robustbench-x", e.name, e.value))
