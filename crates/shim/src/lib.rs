//! What the preload hooks do, as a library that tests can load.
