"""What tests share: conformance suites, oracles, fault injection, tiny models. Not for production."""
