"""Tests of `vllm_parade.cluster`. A package, so that its package-scoped fixtures are torn down after its last test."""
