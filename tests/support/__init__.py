"""What tests of several rooms use; no test imports another test."""
