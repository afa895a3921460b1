//! Ratios, measured side by side in one run.
//!
//! Each bench starts one process per variant, all at once, and lets them take turns in short batches, so
//! that whatever else the machine does meets them alike. What is shown are medians.

pub mod libwrap;
pub mod net;
pub mod socks;
pub mod turns;

/// The median; 0 of nothing.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Writes one line of a table.
#[expect(clippy::print_stdout, reason = "a bench's table is its result")]
pub fn row(text: &str) {
    println!("{text}");
}
