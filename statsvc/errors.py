"""Every error that statsvc raises on purpose.

    StatsvcError
    |-- PlanError                a plan or an argument is wrong; nothing was written
    |   `-- FingerprintMismatch  the store was made by a plan with other numbers
    |-- NotFound                 no teacher, output, method, cache set or row of that name
    |-- NoHadamardMatrix         no construction is known for that order
    |-- MomentsError             statistics that cannot be taken or merged
    |   `-- NonFinite            a feature vector holds NaN or infinity
    |-- TransformError           a transform that is inconsistent or does not fit its data
    |   `-- CannotFit            these moments do not support that method
    |-- StoreError               the store cannot be read or written
    |   |-- NotAStore            nothing there, or something else (a PlanError too: the argument is wrong)
    |   |-- DamagedObject        an object is missing, cut or fails its checksum
    |   |-- AbsentRow            a row has no target
    |   |-- WrongRows            rows or arrays that do not fit the shard they are for
    |   |-- DiskFull             too little space for what is still to be written
    |   `-- LeaseError           another driver holds the store, or took it over
    |-- DatasetShardError        a dataset shard (tar) cannot be used
    |   |-- UnreadableShard      not a tar, or it cannot be opened
    |   |-- ShardTooLarge        more samples than the store has rows per shard
    |   `-- ShardChanged         not the bytes that were indexed
    |-- EngineError              the workers cannot go on
    `-- Interrupted              stopped by Ctrl-C or SIGTERM

Messages say the rule, the value that broke it and the way out.
"""


class StatsvcError(Exception):
    """The root: catch this to catch everything that statsvc raises on purpose."""


class PlanError(StatsvcError, ValueError):
    """A plan or an argument is wrong; nothing was written."""


class FingerprintMismatch(PlanError):
    """The store was made by a plan that computes other numbers."""


class NotFound(StatsvcError, LookupError):
    """No teacher, output, method, cache set or row of that name."""


class NoHadamardMatrix(StatsvcError, ValueError):
    """No construction of a Hadamard matrix is known for that order."""


class MomentsError(StatsvcError, ValueError):
    """Statistics that cannot be taken or merged."""


class NonFinite(MomentsError):
    """A feature vector holds NaN or infinity."""


class TransformError(StatsvcError, ValueError):
    """A transform that is inconsistent or does not fit its data."""


class CannotFit(TransformError):
    """These moments do not support that method."""


class StoreError(StatsvcError):
    """The store cannot be read or written."""


class NotAStore(PlanError, StoreError):
    """There is no store at that location."""


class DamagedObject(StoreError):
    """An object of the store is missing, cut or fails its checksum."""


class AbsentRow(StoreError, LookupError):
    """A row has no target: no such sample, or its image or features could not be used."""


class WrongRows(StoreError, ValueError):
    """Rows or arrays do not fit the shard they are for; nothing of them was written or read."""


class DiskFull(StoreError):
    """There is too little space for what is still to be written."""


class LeaseError(StoreError):
    """Another driver holds the store, or took it over."""


class DatasetShardError(StatsvcError):
    """A dataset shard (tar) cannot be used."""


class UnreadableShard(DatasetShardError):
    """The dataset shard is not a tar, or it cannot be opened."""


class ShardTooLarge(DatasetShardError):
    """The dataset shard holds more samples than the store has rows for."""


class ShardChanged(DatasetShardError):
    """The dataset shard does not hold the bytes that were indexed."""


class EngineError(StatsvcError):
    """The workers cannot go on."""


class Interrupted(StatsvcError):
    """Stopped by Ctrl-C or SIGTERM; everything committed stays."""
