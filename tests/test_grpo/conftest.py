"""Files of configs/ are composed once for all tests."""

from shared_compositions import share

share()
