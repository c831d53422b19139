"""XLA's flags in the tests, for this process and those it starts. It does not import JAX."""

# Most tests compile longer than they compute. With these options XLA compiles in half the time, and the
# programs take about twice as long. (With optimization level 0, they take 17 times as long.)
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_tiled_emitter,xla_cpu_disable_new_fusion_emitters,"
    "xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer,xla_cpu_optimize_for_size"
)


def xla_flags(devices: int) -> str:
    """The value of XLA_FLAGS for a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"
