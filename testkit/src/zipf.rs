//! Zipf-distributed numbers, like the popularity of keys and endpoints.

/// The Zipf distribution with exponent 1: number `i` is drawn 1 / (i + 1) times as often as the first.
#[derive(Debug)]
pub struct Zipf(Vec<f64>);

impl Zipf {
    /// Creates a distribution of the numbers from 0 to `n` - 1. `n` must not be 0.
    pub fn new(n: u32) -> Self {
        let mut sum = 0.0;
        let sums = (1..=n).map(|i| {
            sum += 1.0 / f64::from(i);
            sum
        });
        Self(sums.collect())
    }

    /// Converts a number that is uniformly distributed between 0 and 1 to a number with this distribution.
    pub fn draw(&self, random: f64) -> usize {
        let at = random * self.0.last().expect("at least one number");
        self.0
            .partition_point(|sum| *sum < at)
            .min(self.0.len() - 1)
    }
}
