"""Continuous batching over one frozen LM: scheduler, admission, runner, sampling, and the step."""
