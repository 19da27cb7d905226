"""What tests share: launches, servers, faults."""
