"""The stream of batches: shuffled, augmented, and divided among workers.

The training order is a pure function of (seed, epoch, step): `train_stream(..., start_step=k)`
yields exactly the batches of an uninterrupted run from step k on, augmentation included. So a run
that is killed and resumed ends with the same weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from recipes.data.sets import Data, Split
from recipes.errors import DataError


@dataclasses.dataclass(frozen=True)
class Part:
    """One worker's part of the data.

    Attributes:
        worker, workers: int, its index and the number of workers.
        replicas: int, devices of all workers together, the same number on each.
    """

    worker: int = 0
    workers: int = 1
    replicas: int = 1


WHOLE = Part()


@dataclasses.dataclass(frozen=True)
class Feed:
    """The batches of a run.

    Attributes:
        data: `Data`.
        batch_size: int, the global batch.
        seed: int, determines the order and the augmentation.
        limit: int or None, at most so many batches an epoch and in each evaluation.
        workers: the tf.distribute strategy of several workers, each of which prepares only its own
            part of the data; None for a process that trains alone.
    """

    data: Data
    batch_size: int
    seed: int
    limit: int | None = None
    workers: Any = None

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return steps_per_epoch(self.data.train, self.batch_size, self.limit)

    def training(self, start_step: int) -> Any:
        """The endless `train_stream` from global step `start_step` on."""
        return self._shared(
            lambda part: train_stream(
                self.data, self.batch_size, self.seed, start_step, self.steps, part
            )
        )

    def evaluation(self, split: Split) -> Any:
        """The `eval_batches` of a split."""

        def make(part: Part) -> tf.data.Dataset:
            batches = eval_batches(self.data, split, self.batch_size, part)
            return batches.take(self.limit) if self.limit else batches

        return self._shared(make)

    def _shared(self, make: Callable[[Part], tf.data.Dataset]) -> Any:
        if self.workers is None:
            return make(WHOLE)
        return self.workers.distribute_datasets_from_function(
            lambda context: make(
                Part(
                    context.input_pipeline_id,
                    context.num_input_pipelines,
                    context.num_replicas_in_sync,
                )
            )
        )


def steps_per_epoch(split: Split, batch_size: int, limit: int | None = None) -> int:
    """The number of full batches per epoch; the remainder, different in each epoch, is dropped."""
    steps = split.size // batch_size
    if steps == 0:
        raise DataError(
            f"batch-size={batch_size} is larger than the {split.size} training examples: "
            f"choose {split.size} or less"
        )
    return min(steps, limit) if limit else steps


def train_stream(
    data: Data,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps: int | None = None,
    part: Part = WHOLE,
) -> tf.data.Dataset:
    """Endless batches of (x, y), shuffled and augmented, from global step `start_step` on.

    Args:
        data: `Data`.
        batch_size: int, the global batch, split over the replicas by the strategy.
        seed: int, determines the order and the augmentation.
        start_step: int, steps (batches) of the run already done.
        steps: int or None, steps per epoch; default `steps_per_epoch`.
        part: this worker's `Part` of every batch; each batch then has the size of one replica's.
    """
    steps = steps or steps_per_epoch(data.train, batch_size)
    first_epoch, first_step = divmod(start_step, steps)
    base = data.train.dataset
    buffer = max(1, min(data.shuffle_buffer, data.train.size))

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        # Sets only this graph's seed, so that the order does not depend on the global seed, too
        # (and TensorFlow cannot combine a global 0 with a tensor).
        tf.random.set_seed(1)
        # Seeds of neighbouring epochs must not collide with those of a neighbouring `seed`.
        order = tf.random.stateless_uniform(
            [2], tf.stack([tf.constant(seed, tf.int64), epoch]), None, None, tf.int64
        )
        shuffled = base.shuffle(buffer, seed=order[0], reshuffle_each_iteration=False)
        numbered = shuffled.enumerate().take(steps * batch_size)
        done = tf.where(epoch == first_epoch, first_step * batch_size, 0)
        mine = _share(numbered.skip(tf.cast(done, tf.int64)), part)
        return mine.map(lambda index, element: (tf.stack([order[1], index]), element))

    epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
    stream = epochs.flat_map(one_epoch)
    stream = stream.map(
        lambda example_seed, element: data.preprocess_train(element, example_seed),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    stream = stream.batch(batch_size // part.replicas, drop_remainder=True)
    return stream.prefetch(tf.data.AUTOTUNE).with_options(_options())


def eval_batches(data: Data, split: Split, batch_size: int, part: Part = WHOLE) -> tf.data.Dataset:
    """Batches of (x, y) of a whole split in storage order, the last one possibly smaller.

    With a `part`, this worker's examples in batches for its replicas: the same number on every
    worker, none of them empty, because some layers fail on empty batches.
    """
    examples = _share(split.dataset, part).map(
        data.preprocess_eval, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    batches, count = examples.batch(batch_size), -(-split.size // batch_size)
    if part != WHOLE:
        sizes = _part_sizes(split.size, batch_size, part)
        batches, count = batches.rebatch(sizes), len(sizes)
    batches = batches.prefetch(tf.data.AUTOTUNE)
    return batches.apply(tf.data.experimental.assert_cardinality(count)).with_options(_options())


def _part_sizes(size: int, batch_size: int, part: Part) -> list[int]:
    """The sizes of the batches of one worker's devices in turn, as even as possible.

    `size` is the number of examples of all workers, `batch_size` the largest global batch.
    """
    local = part.replicas // part.workers
    most, least = -(-size // part.workers), size // part.workers
    steps = -(-most // (local * (batch_size // part.replicas)))
    if least < steps * local:
        raise DataError(
            f"{size} examples to evaluate are too few for {part.replicas} devices at "
            f"--batch-size {batch_size}: use fewer devices or a larger batch"
        )
    mine = len(range(part.worker, size, part.workers))
    each, more = divmod(mine, steps * local)
    return [each + 1] * more + [each] * (steps * local - more)


def _share(dataset: tf.data.Dataset, part: Part) -> tf.data.Dataset:
    """Every `workers`-th example, selected before costly operations."""
    return dataset if part.workers == 1 else dataset.shard(part.workers, part.worker)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # Shard by examples, not by files: small sets have fewer files than workers.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return options
