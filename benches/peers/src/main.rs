//! What a decision takes other policy engines, over rules of the kind that the bench `policy` has: one line for
//! each engine and number of rules.

mod cedar;
mod rego;

use std::time::Instant;

const TURNS: usize = 60;

/// The median of some turns, in microseconds.
fn micros(mut turn: impl FnMut()) -> f64 {
    let mut took: Vec<f64> = (0..TURNS)
        .map(|_| {
            let begun = Instant::now();
            turn();
            begun.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    took.sort_by(f64::total_cmp);
    took[TURNS / 2]
}

/// What one of so many rules is about: group, service, zone, and the second and third byte of a prefix.
fn rule(n: usize) -> (usize, usize, usize, usize, usize) {
    (n % 97, n % 24, n % 13, n / 256 % 256, n % 256)
}

fn main() {
    for rules in [100, 1_000, 10_000] {
        println!("cedar, {rules} policies: {:.1} µs", cedar::decision(rules));
        println!("rego (regorus), indexed by hand, {rules} rules: {:.1} µs", rego::decision(rules));
    }
}
