"""Keras models on the torch backend are torch modules, traced and compiled as any other."""

from __future__ import annotations

import os

import pytest
import torch

import optcompiler as oc

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", minversion="3")


def convolutional():
    layers = keras.layers
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(image)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.MaxPooling2D()(layers.Add()([x, y]))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Dense(10, activation="softmax")(x)), torch.rand(2, 16, 16, 3)


def attentive():
    layers = keras.layers
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(50, 16)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x))
    x = layers.Bidirectional(layers.LSTM(8))(x)
    model = keras.Model(tokens, {"label": layers.Dense(3)(x), "score": layers.Dense(1)(x)})
    return model, torch.randint(0, 50, (2, 7), dtype=torch.int32)


@pytest.mark.parametrize("build", [convolutional, attentive])
def test_a_keras_model_compiles_and_computes_the_same(build) -> None:
    if keras.backend.backend() != "torch":
        pytest.skip(f"Keras runs on {keras.backend.backend()} here")
    keras.utils.set_random_seed(0)
    model, example = build()
    # what training leaves in statistics and scales, in place of 0 and 1
    for weight in model.weights:
        weight.assign(weight + 0.1 * keras.random.uniform(weight.shape, seed=1))
    with torch.no_grad():
        wanted = model(example)
    with oc.compile(model, (example,), target="onnxruntime", precision="fp32") as compiled:
        torch.testing.assert_close(compiled(example), wanted, rtol=1e-4, atol=1e-5)
