"""The markers of transformers' own tests, where test_transformers_own.py runs them."""

import os

THEIRS = """
    accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_agent_test is_expert_parallel_test
    is_fsdp_test is_pipeline_test is_staging_test is_tensor_parallel_test is_training_test order slow torch_compile_test
"""


def pytest_configure(config):
    if "VITFAST_TRANSFORMERS_SOURCE" in os.environ:
        for name in THEIRS.split():
            config.addinivalue_line("markers", f"{name}: of transformers' own tests")
