"""The stream of batches: shuffled, augmented, and divided among workers.

The training order is a pure function of (seed, epoch, step): `Feed.training(k)` yields exactly the
batches of an uninterrupted run from step k on, augmentation included. So a run that is killed and
resumed ends with the same weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from recipes.data.sets import Data, Split
from recipes.errors import DataError


@dataclasses.dataclass(frozen=True)
class Feed:
    """The batches of a run.

    Attributes:
        data: `Data`.
        batch_size: int, the global batch, which the strategy splits over the replicas.
        seed: int, determines the order and the augmentation.
        limit: int or None, at most so many batches an epoch and in each evaluation.
        workers: the tf.distribute strategy of several workers, each of which prepares only its own
            examples; None for a process that trains alone.
    """

    data: Data
    batch_size: int
    seed: int = 0
    limit: int | None = None
    workers: Any = None

    @property
    def steps(self) -> int:
        """The number of full batches per epoch; the remainder, which varies, is dropped."""
        size = self.data.train.size
        if size < self.batch_size:
            raise DataError(
                f"batch-size={self.batch_size} is larger than the {size} training examples: "
                f"choose {size} or less"
            )
        return min(size // self.batch_size, self.limit or size)

    def training(self, start_step: int = 0) -> Any:
        """Endless batches of (x, y), shuffled and augmented, from global step `start_step` on."""
        return self._per_worker(lambda context: self._train_batches(start_step, context))

    def evaluation(self, split: Split) -> Any:
        """Batches of (x, y) of a split in storage order, the last one possibly smaller."""
        return self._per_worker(lambda context: self._eval_batches(split, context))

    def _per_worker(self, make: Callable[[tf.distribute.InputContext], tf.data.Dataset]) -> Any:
        if self.workers is None:
            return make(tf.distribute.InputContext())
        return self.workers.distribute_datasets_from_function(make)

    def _train_batches(
        self, start_step: int, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        first_epoch, first_step = divmod(start_step, self.steps)
        data, steps, batch_size = self.data, self.steps, self.batch_size
        buffer = max(1, min(data.shuffle_buffer, data.train.size))

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            # Sets only this graph's seed, so that the order does not depend on the global seed, too
            # (and TensorFlow cannot combine a global 0 with a tensor).
            tf.random.set_seed(1)
            # Seeds of neighbouring epochs must not collide with those of a neighbouring `seed`.
            order = tf.random.stateless_uniform(
                [2], tf.stack([tf.constant(self.seed, tf.int64), epoch]), None, None, tf.int64
            )
            shuffled = data.train.dataset.shuffle(
                buffer, seed=order[0], reshuffle_each_iteration=False
            )
            numbered = shuffled.enumerate().take(steps * batch_size)
            done = tf.where(epoch == first_epoch, first_step * batch_size, 0)
            own = _shard(numbered.skip(tf.cast(done, tf.int64)), context)
            return own.map(lambda index, element: (tf.stack([order[1], index]), element))

        stream = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(one_epoch)
        stream = stream.map(
            lambda example_seed, element: data.preprocess_train(element, example_seed),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        size = context.get_per_replica_batch_size(batch_size)
        stream = stream.batch(size, drop_remainder=True)
        return stream.prefetch(tf.data.AUTOTUNE).with_options(_options())

    def _eval_batches(self, split: Split, context: tf.distribute.InputContext) -> tf.data.Dataset:
        examples = _shard(split.dataset, context).map(
            self.data.preprocess_eval, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        batches, count = examples.batch(self.batch_size), -(-split.size // self.batch_size)
        if context.num_replicas_in_sync > 1:
            sizes = _batch_sizes(split.size, self.batch_size, context)
            batches, count = batches.rebatch(sizes), len(sizes)
        batches = batches.prefetch(tf.data.AUTOTUNE)
        batches = batches.apply(tf.data.experimental.assert_cardinality(count))
        return batches.with_options(_options()).take(self.limit or count)


def _batch_sizes(size: int, batch_size: int, context: tf.distribute.InputContext) -> list[int]:
    """The sizes of the evaluation batches of one worker's devices in turn.

    The same number of batches on every worker, none of them empty, because some layers fail on
    empty batches. `size` is the number of examples of all workers.
    """
    workers = context.num_input_pipelines
    local = context.num_replicas_in_sync // workers
    most, least = -(-size // workers), size // workers
    steps = -(-most // (local * context.get_per_replica_batch_size(batch_size)))
    if least < steps * local:
        raise DataError(
            f"{size} examples to evaluate are too few for {context.num_replicas_in_sync} devices "
            f"at --batch-size {batch_size}: use fewer devices or a larger batch"
        )
    own = len(range(context.input_pipeline_id, size, workers))
    each, more = divmod(own, steps * local)
    return [each + 1] * more + [each] * (steps * local - more)


def _shard(dataset: tf.data.Dataset, context: tf.distribute.InputContext) -> tf.data.Dataset:
    """The examples of one worker, selected before costly operations."""
    return dataset.shard(context.num_input_pipelines, context.input_pipeline_id)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # Shard by examples, not by files: small sets have fewer files than workers.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return options
