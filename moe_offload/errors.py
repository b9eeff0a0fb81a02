"""Every error this package raises on purpose: one base class, one subclass per thing that can go wrong.

A message says three things: what was asked, what was found, what to do about it.
"""


class OffloadError(RuntimeError):
    """Base class: `except OffloadError` catches everything moe_offload raises on purpose."""


class ConfigError(OffloadError, ValueError):
    """A setting means nothing: an unreadable size, an unknown key, a device map that names no module."""


class BudgetError(OffloadError):
    """The budget cannot hold what must always be resident; the message states the floor and its parts."""


class UnsupportedModelError(OffloadError):
    """The model, or one named module of it, cannot be run exactly. Refused before anything is changed."""


class CheckpointError(OffloadError):
    """The checkpoint on disk is damaged, incomplete, or does not fit the model."""


class CheckpointChangedError(CheckpointError):
    """A checkpoint file was modified after it was opened."""


class PackError(OffloadError):
    """A packed checkpoint could not be written, or does not read back as it was written; nothing of it is left."""


class SaveError(OffloadError):
    """An offloaded model could not be saved; what was in the folder is unchanged, or the message says where it is."""


class ExpertReadError(OffloadError):
    """An expert's bytes could not be read completely; names file, offset and what was found."""


class RankError(OffloadError):
    """Another process of a run on several ranks has ended, does not answer, or runs something else; it is named."""


class RoutingError(OffloadError):
    """The router asked for an expert id outside [0, E)."""


class ProfileError(OffloadError):
    """A profile file is damaged, too large, of another version, or of another model."""


class TraceError(OffloadError):
    """A trace, or a profile to be merged with a timeline, is damaged, too large, or of something else; or what was to
    be recorded or saved was not."""


class ReportError(OffloadError):
    """The record of a run is damaged, too large, or not there; or a report cannot be made or written."""


class LiveError(OffloadError):
    """A running model cannot be watched: it is gone, does not answer, or its socket is not to be trusted."""


class ServeError(OffloadError):
    """The server cannot be started: an address that cannot be had, or a package that is not installed."""


class ClosedError(OffloadError):
    """The model was closed: its threads, files and memory have been given back."""
