"""What tests share: conformance suites, oracles, faults, tiny models. Not for production."""
