"""What ``armd bench`` measures."""
