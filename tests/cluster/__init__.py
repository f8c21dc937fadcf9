"""Tests of `vllm_parade.cluster`; a package, so that the fixtures of its conftest end with its last test."""
