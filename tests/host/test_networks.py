"""Other people's networks and training steps: with the clip out of reach, as without a clip."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradclip as kgc

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.slow

FAR = 1e30


def stock():
    return keras.optimizers.Adam(1e-3)


def wrapped():
    return kgc.ClippedOptimizer(stock(), kgc.NormClip(FAR))


def far_clipped_sgd(rate):
    return kgc.ClippedOptimizer(keras.optimizers.SGD(rate), kgc.NormClip(FAR))


class VAE(keras.Model):
    """The example of keras.io, small."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(4)])
        self.decoder = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(12)])
        self.noise = keras.random.SeedGenerator(1)

    def call(self, x):
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        z = mean + ops.exp(0.5 * log_variance) * keras.random.normal(mean.shape, seed=self.noise)
        return self.decoder(z), mean, log_variance

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            y, mean, log_variance = self(x)
            kl = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
            loss = ops.mean(ops.square(x - y)) + ops.mean(ops.sum(kl, axis=1))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss}


class SimCLR(keras.Model):
    """Two views of a batch against each other; the loss of NT-Xent."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(4)])
        self.noise = keras.random.SeedGenerator(2)

    def call(self, x):
        view = x + 0.1 * keras.random.normal(x.shape, seed=self.noise)
        return ops.normalize(self.encoder(view), axis=-1)

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            logits = ops.matmul(self(x), ops.transpose(self(x))) / 0.5
            labels = ops.arange(x.shape[0])
            losses = [
                keras.losses.sparse_categorical_crossentropy(labels, side, from_logits=True)
                for side in (logits, ops.transpose(logits))
            ]
            loss = ops.mean(ops.stack(losses))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return {"loss": loss}


class GAN(keras.Model):
    """Two networks, two optimizers, two updates a batch."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(12)])
        self.critic = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(1)])
        self.noise = keras.random.SeedGenerator(3)

    def call(self, x):
        return self.critic(self.generator(x[:, :3]) + x)

    def compile(self, optimizer, other):
        super().compile()
        self.generator_optimizer, self.critic_optimizer = optimizer, other

    def train_step(self, data):
        x, _ = data
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        z = keras.random.normal((x.shape[0], 3), seed=self.noise)
        with tf.GradientTape() as tape:
            answers = ops.concatenate([self.critic(x), self.critic(self.generator(z))])
            truth = ops.concatenate([ops.ones_like(x[:, :1]), ops.zeros_like(x[:, :1])])
            critic_loss = loss(truth, answers)
        weights = self.critic.trainable_weights
        self.critic_optimizer.apply(tape.gradient(critic_loss, weights), weights)
        with tf.GradientTape() as tape:
            generator_loss = loss(ops.ones_like(x[:, :1]), self.critic(self.generator(z)))
        weights = self.generator.trainable_weights
        self.generator_optimizer.apply(tape.gradient(generator_loss, weights), weights)
        return {"critic": critic_loss, "generator": generator_loss}


def trained(model, x, y=None):
    before = model.get_weights()
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    after = model.get_weights()
    moved = max(np.abs(a - b).max() for a, b in zip(after, before, strict=True))
    assert moved > 1e-4
    return after


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [VAE, SimCLR, GAN])
def test_train_step(cls):
    x = np.random.default_rng(0).normal(size=(8, 12)).astype("float32")
    results = []
    for make in (stock, wrapped):
        keras.utils.set_random_seed(0)
        model = cls()
        model(x[:4])
        model.compile(*([make(), make()] if cls is GAN else [make()]))
        results.append(trained(model, x, np.zeros(8)))
    assert_equal(*results)


@pytest.mark.parametrize(
    "name", ["EfficientNetV2B0", "ConvNeXtTiny", "DenseNet121", "MobileNetV3Small"]
)
def test_application(name):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, (8, 32, 32, 3)).astype("float32"), np.arange(8) % 3
    results = []
    for make in (keras.optimizers.SGD, far_clipped_sgd):
        keras.utils.set_random_seed(0)
        build = getattr(keras.applications, name)
        model = build(weights=None, input_shape=(32, 32, 3), classes=3)
        model.compile(make(0.01), "sparse_categorical_crossentropy")
        results.append(trained(model, x, y))
    assert_equal(*results)
