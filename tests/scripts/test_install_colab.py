"""What is installed on a machine that comes with JAX, and which of its packages stay."""

import pytest

from scripts.install_colab import make_plan

# Versions as of 2026-06, from the lists of packages that Colab publishes for its images; Python 3.12.
SHARED = {
    "absl-py": "1.4.0", "flax": "0.11.2", "numpy": "2.0.2", "optax": "0.2.8", "orbax-checkpoint": "0.12.0",
    "protobuf": "5.29.6", "matplotlib": "3.10.0", "scikit-learn": "1.6.1", "pillow": "11.3.0",
}  # fmt: skip
TENSORFLOW = {"tensorflow": "2.20.0", "tensorboard": "2.20.0"}
OLD = {"jax": "0.7.2", "jaxlib": "0.7.2"}
NEW = {"jax": "0.12.0", "jaxlib": "0.12.0", "flax": "0.12.12", "numpy": "2.4.0"}
CUDA = {"jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2", "nvidia-cudnn-cu12": "9.19.0.56"}


def test_jax_that_is_new_enough_stays_in_all_its_parts():
    plan = make_plan({**SHARED, **NEW, "libtpu": "0.0.50"}, "tpu", python="3.12")
    assert plan.extras == ("tf",)
    stays = {"jax": "0.12.0", "jaxlib": "0.12.0", "libtpu": "0.0.50", "numpy": "2.4.0", "protobuf": "5.29.6"}
    assert stays.items() <= plan.constraints.items()
    assert plan.too_old == {"absl-py": ">=2.0"}


def test_old_jax_is_replaced_with_its_plugin_and_numpy():
    plan = make_plan({**SHARED, **OLD, **CUDA, **TENSORFLOW}, "gpu", driver=580, python="3.12")
    assert plan.extras == ("gpu-cuda12",)  # the plugin that is there; two of them would exclude each other
    assert set(plan.too_old) == {"absl-py", "jax", "flax"}
    replaced = {"jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "numpy", "flax", "absl-py"}
    assert not replaced & plan.constraints.keys()
    assert {"tensorflow", "protobuf", "matplotlib", "nvidia-cudnn-cu12"} <= plan.constraints.keys()


def test_tensorflow_is_installed_only_where_there_is_none():
    assert make_plan({**SHARED, **NEW}, "cpu", python="3.12").extras == ("tf",)
    plan = make_plan({**SHARED, **NEW, **TENSORFLOW}, "cpu", python="3.12")
    assert (plan.extras, plan.requirements) == ((), ())
    plan = make_plan({**SHARED, **NEW, "tensorflow": "2.19.0"}, "cpu", python="3.12")
    assert plan.requirements == ("tensorboard>=2.20", "tensorflow>=2.20")


@pytest.mark.parametrize(("driver", "extra"), [(535, "gpu-cuda12"), (580, "gpu")])
def test_without_a_plugin_the_driver_decides(driver, extra):
    assert make_plan({**SHARED, **NEW}, "gpu", driver=driver, python="3.12").extras == (extra, "tf")


def test_without_jax_everything_is_installed():
    assert make_plan({}, "tpu", python="3.12").extras == ("tpu", "tf")
