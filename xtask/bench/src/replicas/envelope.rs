//! The judge: what a client saw admitted, held against the promise, in every window there is.
//!
//! The promise is a token bucket's: in any window of `T` at most `burst + rate·(T + slack)`. A client does not
//! know when a request was admitted, only that it was after it sent the request and before it had the answer.
//! So a window counts those requests alone that lie in it whole; any other could have been admitted outside.
//! What is found above the promise was therefore above it, whatever happened in between. Owns this arithmetic,
//! in whole nanoseconds, and knows nothing of how the times came about.

/// One token bucket's promise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    /// Nanoseconds a token takes to come back, rounded up as the server does.
    emission: i64,
    /// The nanoseconds' worth of tokens that a window of no length may hold: the burst and the slack.
    at_once: i64,
}

/// From just before a request was sent until just after it was answered, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) sent: u64,
    pub(crate) answered: u64,
}

/// The window in which most was admitted above the promise, or least below it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Worst {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) admitted: u64,
    /// In tokens above the promise; negative below it.
    pub(crate) excess: f64,
}

const MINUTE: u64 = 60_000_000_000;

impl Envelope {
    /// `slack` is what leases may add, in nanoseconds of refill.
    pub(crate) fn new(rpm: u32, burst: u32, slack: std::time::Duration) -> Self {
        let emission = signed(MINUTE.div_ceil(u64::from(rpm)));
        Self {
            emission,
            at_once: emission * i64::from(burst) + signed(slack.as_nanos()),
        }
    }

    /// How many requests it allows in `nanos` that begin with a full bucket.
    pub(crate) fn allows(self, nanos: u64) -> u64 {
        u64::try_from((self.at_once + signed(nanos)) / self.emission).unwrap_or(0)
    }

    /// How many a single exact bucket, full at first, would have admitted of requests at these times.
    pub(crate) fn exact(self, mut times: Vec<u64>) -> u64 {
        times.sort_unstable();
        let (mut full_at, mut admitted) = (i64::MIN, 0);
        for time in times.into_iter().map(signed) {
            let next = full_at.max(time) + self.emission;
            if next - time <= self.at_once {
                full_at = next;
                admitted += 1;
            }
        }
        admitted
    }

    /// The worst window; `None` when nothing was admitted. In n log n: windows end where answers are; for all
    /// their beginnings at once, a tree keeps what each window has above the promise so far.
    pub(crate) fn worst(self, admitted: &[Span]) -> Option<Worst> {
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
            tree.add(place, self.emission);
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
            admitted: admitted.iter().filter(inside).count() as u64,
            excess: above as f64 / self.emission as f64,
        })
    }
}

fn signed(nanos: impl TryInto<i64>) -> i64 {
    nanos
        .try_into()
        .unwrap_or_else(|_| panic!("a measurement lasts no 292 years"))
}

/// For each beginning of a window, its time and the worth of what was admitted since: kept as sums of suffixes,
/// so that one admission is one change of one leaf.
struct Tree {
    leaves: usize,
    nodes: Vec<Node>,
}

#[derive(Clone, Copy)]
struct Node {
    sum: i64,
    /// The best suffix that begins here, and where.
    best: i64,
    begin: usize,
}

/// Lower than any value that is reached, and far from the end of the numbers.
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

    /// From now on windows may begin at this place.
    fn open(&mut self, place: usize, time: i64) {
        let leaf = &mut self.nodes[self.leaves + place];
        (leaf.best, leaf.begin) = (time + leaf.sum, place);
        self.mend(place);
    }

    /// Something of this worth was admitted that began there.
    fn add(&mut self, place: usize, worth: i64) {
        let leaf = &mut self.nodes[self.leaves + place];
        leaf.sum += worth;
        leaf.best += worth;
        self.mend(place);
    }

    fn mend(&mut self, place: usize) {
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

    /// Every window, one by one.
    fn naive(envelope: Envelope, spans: &[Span]) -> Option<i64> {
        let mut most = None;
        for from in spans.iter().map(|it| it.sent) {
            for to in spans.iter().map(|it| it.answered).filter(|to| *to >= from) {
                let inside = spans
                    .iter()
                    .filter(|it| from <= it.sent && it.answered <= to);
                let worth = envelope.emission * signed(inside.count());
                let above = worth - signed(to - from) - envelope.at_once;
                most = most.max(Some(above));
            }
        }
        most
    }

    fn exact_limiter(envelope: Envelope, mut times: Vec<u64>) -> Vec<u64> {
        times.sort_unstable();
        let mut full_at = 0;
        times.retain(|time| {
            let next = i64::max(full_at, signed(*time)) + envelope.emission;
            let fits = next - signed(*time) <= envelope.at_once;
            if fits {
                full_at = next;
            }
            fits
        });
        times
    }

    fn spans() -> impl Strategy<Value = Vec<Span>> {
        let span = (0..200u64, 0..60u64).prop_map(|(sent, took)| Span {
            sent,
            answered: sent + took,
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
        fn the_fast_way_finds_what_looking_at_every_window_does(
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
                // The window it names is one that shows it.
                let above = emission * signed(worst.admitted)
                    - signed(worst.to - worst.from) - envelope.at_once;
                prop_assert_eq!(above, naive);
            }
        }

        /// Whenever within its span each admission took place.
        #[test]
        fn an_exact_bucket_is_never_found_guilty(
            times in prop::collection::vec((0..2_000u64, 0..50u64, 0..50u64), 1..200),
            emission in 1..30i64,
            burst in 1..20i64,
        ) {
            let envelope = envelope(emission, burst);
            let admitted = exact_limiter(envelope, times.iter().map(|it| it.0).collect());
            let spans: Vec<_> = admitted.iter().zip(&times).map(|(time, (_, before, after))| Span {
                sent: time.saturating_sub(*before),
                answered: time + after,
            }).collect();
            prop_assert!(envelope.worst(&spans).is_none_or(|worst| worst.excess <= 0.0));
            prop_assert_eq!(
                envelope.exact(times.iter().map(|it| it.0).collect()),
                admitted.len() as u64
            );
        }

        #[test]
        fn two_buckets_in_the_place_of_one_are_found_out(
            emission in 5..30i64,
            burst in 1..20i64,
        ) {
            let envelope = envelope(emission, burst);
            let times: Vec<u64> = (0..200).collect();
            let once = exact_limiter(envelope, times);
            let twice: Vec<_> = once.iter().chain(&once).map(|time| Span {
                sent: *time,
                answered: time + 1,
            }).collect();
            let worst = envelope.worst(&twice).unwrap();
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let expected = once.len() as f64 - 1.0;
            prop_assert!(worst.excess >= expected, "{worst:?}");
        }
    }

    #[test]
    fn a_window_holds_what_lies_in_it_whole() {
        // One token a second, three at once.
        let envelope = Envelope::new(60, 3, Duration::ZERO);
        let span = |sent, answered| Span { sent, answered };
        assert_eq!(envelope.worst(&[]), None);
        let at_once = vec![span(10, 20); 4];
        let worst = envelope.worst(&at_once).unwrap();
        assert_eq!((worst.from, worst.to, worst.admitted), (10, 20, 4));
        assert!((worst.excess - 1.0).abs() < 1e-6);
        // One of the four may have been admitted much later.
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
