"""How good are the features of a model: k-nearest neighbors and a linear classifier on frozen features."""

import logging
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.models.functional import functionalize
from tlvit.models.table import model_task
from tlvit.ops.knn import knn_scores
from tlvit.ops.losses import soft_cross_entropy
from tlvit.ops.normalize import normalize
from tlvit.training.mesh import mesh_context, replicated
from tlvit.types import Array, Batch, PyTree

KS = (10, 20, 100, 200)  # neighbors, as in DINO
QUERIES = 256  # that are compared with all features at a time
STRENGTHS = tuple(10.0**k for k in range(-6, 2))  # of the L2 penalty, of which one is chosen
HELD_OUT = 5  # one of so many training images chooses the strength
MAX_ITERATIONS = 500
SMALL_GRADIENT = 1e-5  # largest element at which the linear classifier is found

log = logging.getLogger("tlvit")


def extract_features(
    model: nnx.Module, info: ModelInfo, batches: Iterable[Batch], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The features of all images of a split, in order.

    Args:
      model: a classifier.
      info: its ModelInfo.
      batches: global batches whose padding is masked.
      mesh: the devices.

    Returns:
      Features float32 [N, D] (`Model.pooled_features`) and labels int32 [N].

    Raises:
      ValueError: the model is no classifier, there are no images, or a feature is NaN or infinite.
    """
    if model_task(info.model) != "classification":
        raise ValueError(f"{info.model} is a segmentation model; features are those of classifiers.")
    net, params, stats = functionalize(model)
    rule = info.preprocessing

    @jax.jit
    def run(params: PyTree, stats: PyTree, images: Array) -> Array:
        with mesh_context(mesh):
            pooled = net.bind(params, stats).pooled_features(normalize(images, rule.mean, rule.std))
        return jax.lax.with_sharding_constraint(pooled.astype(jnp.float32), replicated(mesh))

    params, stats = jax.device_put((params, stats), replicated(mesh))
    features, labels = [], []
    for batch in batches:
        mask = np.asarray(batch.mask)
        features.append(np.asarray(run(params, stats, batch.image))[mask])
        labels.append(np.asarray(batch.label)[mask])
    if not sum(map(len, labels)):
        raise ValueError("The split has no images.")
    found = np.concatenate(features)
    if not np.isfinite(found).all():
        raise ValueError(f"Features of this {info.model} are NaN or infinite.")
    return found, np.concatenate(labels)


def knn_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy of k-nearest neighbors in percent, for each k (`knn_scores`).

    Args:
      train: features [N, D] and labels [N] of the known images.
      test: features and labels of the images to classify.
      num_classes: L.
      ks: numbers of neighbors. Those above N are left out; if none is left, N is used.
      temperature: of the votes, above 0.
    """
    fitting = tuple(k for k in ks if k <= len(train[1])) or (len(train[1]),)
    right = np.zeros(len(fitting))
    vote = jax.jit(knn_scores, static_argnames=("ks", "num_classes", "temperature"))
    train = jax.device_put(train)  # once, not for every part of the queries
    for start in range(0, len(test[1]), QUERIES):
        queries, labels = (x[start : start + QUERIES] for x in test)
        options = {"ks": fitting, "num_classes": num_classes, "temperature": temperature}
        best = np.asarray(vote(queries, *train, **options)).argmax(-1)
        right += (best == labels).sum(-1)
    return {k: float(100 * r / len(test[1])) for k, r in zip(fitting, right, strict=True)}


def linear_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    strength: float | None = None,
) -> tuple[float, float]:
    """Top-1 accuracy of a linear classifier on the features, in percent, and the strength of its penalty.

    Args:
      train: features [N, D] and labels [N] that the classifier is fitted to.
      test: features and labels of the images to classify.
      num_classes: L.
      strength: of the L2 penalty, see `fit_linear`. None: of 1e-6 to 10, the one that is best for a fifth of
        the training images after fitting the others.
    """
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
    known, queries = (train[0] - mean) / deviation, (test[0] - mean) / deviation
    if strength is None:
        order = np.random.default_rng(0).permutation(len(known))
        held, rest = order[::HELD_OUT], np.setdiff1d(order, order[::HELD_OUT])
        found = {}
        for value in STRENGTHS:
            weights = fit_linear(known[rest], train[1][rest], num_classes=num_classes, strength=value)
            found[value] = _accuracy(weights, known[held], train[1][held])
            log.info("linear classifier, L2 penalty %g: %.2f%% of held-out images", value, found[value])
        strength = max(found, key=lambda value: (found[value], value))
    weights = fit_linear(known, train[1], num_classes=num_classes, strength=strength)
    return _accuracy(weights, queries, test[1]), strength


def fit_linear(
    features: np.ndarray, labels: np.ndarray, *, num_classes: int, strength: float
) -> dict[str, np.ndarray]:
    """Multinomial logistic regression: the mean cross entropy plus strength / 2 times the kernel's squares.

    The objective is convex and its minimum is found by L-BFGS on all images at once, which needs neither a
    learning rate nor a seed.

    Args:
      features: float32 [N, D], about standardized.
      labels: int [N].
      num_classes: L.
      strength: of the penalty, above 0. The C of scikit-learn is 1 / (N * strength).

    Returns:
      {"kernel": [D, L], "bias": [L]}.
    """
    x, targets = jnp.asarray(features), jax.nn.one_hot(labels, num_classes)
    weights = {"kernel": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    return jax.device_get(_minimize(weights, x, targets, strength))


@jax.jit
def _minimize(weights: PyTree, x: Array, targets: Array, strength: float) -> PyTree:
    def objective(w: PyTree) -> Array:
        logits = jnp.matmul(x, w["kernel"], precision="highest") + w["bias"][None]
        return jnp.mean(soft_cross_entropy(logits, targets)) + 0.5 * strength * jnp.sum(w["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[PyTree, PyTree, Array]) -> tuple[PyTree, PyTree, Array]:
        w, state, count = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(w, updates), state, count + 1

    def goes_on(carry: tuple[PyTree, PyTree, Array]) -> Array:
        _, state, count = carry
        largest = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return (count == 0) | ((count < MAX_ITERATIONS) & (largest > SMALL_GRADIENT))

    return jax.lax.while_loop(goes_on, step, (weights, solver.init(weights), jnp.int32(0)))[0]


def _accuracy(weights: dict[str, np.ndarray], features: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy of a linear classifier, in percent."""
    best = (features @ weights["kernel"] + weights["bias"]).argmax(-1)
    return float(100 * (best == labels).mean())
