//! Measures the operations that a decision consists of.
//!
//! `cargo bench --package quota-operations` measures the time of each operation. `cargo xtask bench instructions`
//! counts instructions under Valgrind, and compares the counts with `server/benches/instructions.toml`.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::Criterion;
use quota_operations::{Operation, World, migrate};

/// Returns the number after `--instructions`: how many times to run each operation.
fn times() -> Option<u64> {
    let mut arguments = std::env::args().skip_while(|it| it != "--instructions");
    arguments.next()?;
    let times = arguments.next().and_then(|it| it.parse().ok());
    Some(times.expect("a number after `--instructions`"))
}

/// Runs an operation `times` times. Valgrind counts instructions only while this function runs.
#[inline(never)]
fn measured(operation: &mut Operation, times: u64) {
    (operation.run)(times);
    // Do something after the call. Otherwise, the compiler could turn the call into a jump, and Valgrind could not
    // detect where the function ends.
    black_box(operation);
}

fn main() {
    migrate();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let world = World::start().await;
        let mut operations = world.operations();
        if let Some(times) = times() {
            for operation in &mut operations {
                // Fill caches and buffers first, because this work is not part of the operation.
                (operation.run)(10);
                println!("operation: {}", operation.name);
                measured(operation, times);
            }
        } else {
            let mut criterion = Criterion::default()
                .warm_up_time(Duration::from_millis(100))
                .measurement_time(Duration::from_millis(300))
                .configure_from_args();
            for operation in &mut operations {
                criterion.bench_function(operation.name, |bencher| {
                    bencher.iter_custom(|times| {
                        let began = Instant::now();
                        measured(operation, times);
                        began.elapsed()
                    });
                });
            }
            criterion.final_summary();
        }
    });
}
