//! A sliding-window checker, which compares the requests that were allowed in each window with an envelope.
//!
//! An envelope is what a token bucket may allow: at most `burst + rate·(T + slack)` tokens in any window of `T`. A
//! client only knows that a request was allowed at some time between sending the request and receiving the response.
//! Therefore, a window counts only requests that lie entirely inside the window, and any excess found is real. The
//! checker works in whole nanoseconds, with any clock.

/// The maximum number of tokens that one token bucket may allow in a window of any length.
#[derive(Debug, Clone, Copy)]
pub struct Envelope {
    /// The emission interval in nanoseconds, rounded up as the server does.
    emission: i64,
    /// The number of tokens that may be allowed at a single instant (the burst plus the slack), expressed as the time
    /// in which they refill, in nanoseconds.
    at_once: i64,
}

/// The times just before a request was sent and just after its response arrived, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub sent: u64,
    pub answered: u64,
    /// The number of tokens that the request takes.
    pub cost: u32,
}

/// The window that is furthest above the envelope, or, if none is above it, the window that is closest to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worst {
    pub from: u64,
    pub to: u64,
    /// The number of tokens that were allowed in the window.
    pub admitted: u64,
    /// The number of tokens above the envelope. Negative if the window is below the envelope.
    pub excess: f64,
}

const MINUTE: u64 = 60_000_000_000;

impl Envelope {
    /// Creates an envelope from a plan. `slack` is the refill time of the tokens that leases may add.
    pub fn new(rpm: u32, burst: u32, slack: std::time::Duration) -> Self {
        let emission = signed(MINUTE.div_ceil(u64::from(rpm)));
        Self {
            emission,
            at_once: emission * i64::from(burst) + signed(slack.as_nanos()),
        }
    }

    /// Creates an envelope from the emission interval and the maximum number of tokens at a single instant, expressed
    /// as the time in which they refill. Both are in nanoseconds.
    pub fn from_nanos(emission: u64, at_once: u64) -> Self {
        Self {
            emission: signed(emission),
            at_once: signed(at_once),
        }
    }

    /// Returns the number of tokens that the envelope allows in a window of `nanos`.
    pub fn allows(self, nanos: u64) -> u64 {
        u64::try_from((self.at_once + signed(nanos)) / self.emission).unwrap_or(0)
    }

    /// Returns the number of tokens that a single exact bucket, initially full, would have allowed. `requests` contains
    /// the time and the cost of each request.
    pub fn exact(self, mut requests: Vec<(u64, u32)>) -> u64 {
        requests.sort_unstable();
        let (mut full_at, mut admitted) = (i64::MIN, 0);
        for (time, cost) in requests {
            let time = signed(time);
            let next = full_at.max(time) + self.emission * i64::from(cost);
            if next - time <= self.at_once {
                full_at = next;
                admitted += u64::from(cost);
            }
        }
        admitted
    }

    /// Returns the worst window, or `None` if nothing was allowed. Takes `O(n log n)` time: every window ends at a
    /// response, and a tree contains the current excess for all starts.
    pub fn worst(self, admitted: &[Span]) -> Option<Worst> {
        let mut begins: Vec<u64> = admitted.iter().map(|span| span.sent).collect();
        begins.sort_unstable();
        begins.dedup();
        let mut spans = admitted.to_vec();
        spans.sort_unstable_by_key(|span| span.answered);

        let mut tree = Tree::new(begins.len());
        let (mut open, mut worst) = (0, None::<(i64, usize, u64)>);
        let mut ends = spans.iter().peekable();
        while let Some(span) = ends.next() {
            while let Some(&begin) = begins.get(open).filter(|it| **it <= span.answered) {
                tree.open(open, signed(begin));
                open += 1;
            }
            let Ok(place) = begins.binary_search(&span.sent) else {
                continue;
            };
            tree.add(place, self.emission * i64::from(span.cost));
            if ends.peek().is_some_and(|it| it.answered == span.answered) {
                continue;
            }
            let (above, begin) = tree.best();
            let above = above - signed(span.answered) - self.at_once;
            if worst.is_none_or(|(most, ..)| above > most) {
                worst = Some((above, begin, span.answered));
            }
        }
        let (above, begin, to) = worst?;
        let from = begins[begin];
        let inside = |span: &&Span| from <= span.sent && span.answered <= to;
        #[expect(
            clippy::cast_precision_loss,
            reason = "a fraction of a token is enough"
        )]
        Some(Worst {
            from,
            to,
            admitted: admitted
                .iter()
                .filter(inside)
                .map(|it| u64::from(it.cost))
                .sum(),
            excess: above as f64 / self.emission as f64,
        })
    }
}

fn signed(nanos: impl TryInto<i64>) -> i64 {
    nanos
        .try_into()
        .unwrap_or_else(|_| panic!("a measurement is shorter than 292 years"))
}

/// A segment tree with one leaf for each possible start of a window. The value of a start is its time plus the value of
/// all requests that were sent at or after this time. These sums are suffix sums, so one allowed request changes only
/// one leaf.
struct Tree {
    leaves: usize,
    nodes: Vec<Node>,
}

#[derive(Clone, Copy)]
struct Node {
    sum: i64,
    /// The highest value of a start in this node, counting only requests in this node, and the index of this start.
    best: i64,
    begin: usize,
}

/// A value below all possible values, and far from overflowing.
const CLOSED: i64 = i64::MIN / 4;

impl Tree {
    fn new(leaves: usize) -> Self {
        let leaves = leaves.next_power_of_two();
        let node = Node {
            sum: 0,
            best: CLOSED,
            begin: 0,
        };
        Self {
            leaves,
            nodes: vec![node; 2 * leaves],
        }
    }

    /// Allows windows to begin at index `place` from now on.
    fn open(&mut self, place: usize, time: i64) {
        let leaf = &mut self.nodes[self.leaves + place];
        (leaf.best, leaf.begin) = (time + leaf.sum, place);
        self.update(place);
    }

    /// Adds an allowed request of value `worth` that was sent at index `place`.
    fn add(&mut self, place: usize, worth: i64) {
        let leaf = &mut self.nodes[self.leaves + place];
        leaf.sum += worth;
        leaf.best += worth;
        self.update(place);
    }

    fn update(&mut self, place: usize) {
        let mut at = (self.leaves + place) >> 1;
        while at > 0 {
            let (left, right) = (self.nodes[2 * at], self.nodes[2 * at + 1]);
            let over = left.best + right.sum;
            let (best, begin) = if over > right.best {
                (over, left.begin)
            } else {
                (right.best, right.begin)
            };
            self.nodes[at] = Node {
                sum: left.sum + right.sum,
                best,
                begin,
            };
            at /= 2;
        }
    }

    fn best(&self) -> (i64, usize) {
        let root = self.nodes[1];
        (root.best, root.begin)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Returns the excess of the worst window, found by checking every window separately.
    fn naive(envelope: Envelope, spans: &[Span]) -> Option<i64> {
        let mut most = None;
        for from in spans.iter().map(|it| it.sent) {
            for to in spans.iter().map(|it| it.answered).filter(|to| *to >= from) {
                let inside = spans
                    .iter()
                    .filter(|it| from <= it.sent && it.answered <= to);
                let cost: u32 = inside.map(|it| it.cost).sum();
                let worth = envelope.emission * i64::from(cost);
                let above = worth - signed(to - from) - envelope.at_once;
                most = most.max(Some(above));
            }
        }
        most
    }

    /// Returns the requests that a token bucket admits. Unlike in `Envelope::exact`, the bucket is refilled step by
    /// step.
    fn exact_limiter(envelope: Envelope, mut requests: Vec<(u64, u32)>) -> Vec<(u64, u32)> {
        requests.sort_unstable();
        let (mut level, mut last) = (envelope.at_once, 0);
        requests.retain(|(time, cost)| {
            let time = signed(*time);
            level = (level + time - last).min(envelope.at_once);
            last = time;
            let price = envelope.emission * i64::from(*cost);
            let fits = price <= level;
            if fits {
                level -= price;
            }
            fits
        });
        requests
    }

    fn spans() -> impl Strategy<Value = Vec<Span>> {
        let span = (0..200u64, 0..60u64, 1..6u32).prop_map(|(sent, took, cost)| Span {
            sent,
            answered: sent + took,
            cost,
        });
        prop::collection::vec(span, 0..40)
    }

    fn envelope(emission: i64, burst: i64) -> Envelope {
        Envelope {
            emission,
            at_once: emission * burst,
        }
    }

    proptest! {
        #[test]
        fn the_tree_finds_the_worst_of_all_windows(
            spans in spans(),
            emission in 1..30i64,
            burst in 1..5i64,
        ) {
            let envelope = envelope(emission, burst);
            let naive = naive(envelope, &spans);
            let worst = envelope.worst(&spans);
            prop_assert_eq!(naive.is_some(), worst.is_some());
            if let (Some(naive), Some(worst)) = (naive, worst) {
                #[expect(clippy::cast_precision_loss, reason = "small numbers")]
                let expected = naive as f64 / emission as f64;
                prop_assert!((worst.excess - expected).abs() < 1e-9);
                // The reported window contains the excess.
                let above = emission * signed(worst.admitted)
                    - signed(worst.to - worst.from) - envelope.at_once;
                prop_assert_eq!(above, naive);
            }
        }

        /// There is no excess, regardless of when in its span each request was admitted.
        #[test]
        fn an_exact_bucket_has_no_excess(
            requests in prop::collection::vec((0..2_000u64, 1..6u32, 0..50u64, 0..50u64), 1..200),
            emission in 1..30i64,
            burst in 1..20i64,
        ) {
            let envelope = envelope(emission, burst);
            let plain: Vec<_> = requests.iter().map(|it| (it.0, it.1)).collect();
            let admitted = exact_limiter(envelope, plain.clone());
            let around = admitted.iter().zip(&requests);
            let spans: Vec<_> = around.map(|((time, cost), (_, _, before, after))| Span {
                sent: time.saturating_sub(*before),
                answered: time + after,
                cost: *cost,
            }).collect();
            prop_assert!(envelope.worst(&spans).is_none_or(|worst| worst.excess <= 0.0));
            let cost: u64 = admitted.iter().map(|it| u64::from(it.1)).sum();
            prop_assert_eq!(envelope.exact(plain), cost);
        }

        #[test]
        fn two_buckets_instead_of_one_are_detected(
            emission in 5..30i64,
            burst in 1..20i64,
        ) {
            let envelope = envelope(emission, burst);
            let once = exact_limiter(envelope, (0..200).map(|time| (time, 1)).collect());
            let twice: Vec<_> = once.iter().chain(&once).map(|(time, cost)| Span {
                sent: *time,
                answered: time + 1,
                cost: *cost,
            }).collect();
            let worst = envelope.worst(&twice).unwrap();
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let expected = once.len() as f64 - 1.0;
            prop_assert!(worst.excess >= expected, "{worst:?}");
        }
    }

    #[test]
    fn a_window_counts_only_what_lies_inside() {
        // One token per second with a burst of three.
        let envelope = Envelope::new(60, 3, Duration::ZERO);
        let span = |sent, answered| Span {
            sent,
            answered,
            cost: 1,
        };
        assert_eq!(envelope.worst(&[]), None);
        let at_once = vec![span(10, 20); 4];
        let worst = envelope.worst(&at_once).unwrap();
        assert_eq!((worst.from, worst.to, worst.admitted), (10, 20, 4));
        assert!((worst.excess - 1.0).abs() < 1e-6);
        // One of the four requests may have been admitted much later.
        let late = [
            span(10, 20),
            span(10, 20),
            span(10, 20),
            span(10, 1_000_000_020),
        ];
        assert!(envelope.worst(&late).unwrap().excess <= 0.0);
        assert_eq!(envelope.allows(0), 3);
        assert_eq!(envelope.allows(2_000_000_000), 5);
        let slack = Envelope::new(60, 3, Duration::from_secs(1));
        assert!(slack.worst(&at_once).unwrap().excess <= 0.0);
    }
}
