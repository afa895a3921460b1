//! Connects to ADDRESS:PORT, prints what it reads.

fn main() {}
