//! Feeds bytes to the parser of plain requests, and compares the requests that it finds with those that hyper finds.
//! `cargo xtask fuzz` runs this target.

#![no_main]

// These two files of the server are compiled without the rest of the server, because compiling all of its dependencies
// with instrumentation would take many minutes.
#[expect(dead_code, reason = "the server uses the other items")]
#[path = "../../src/connection_marks.rs"]
mod connection_marks;
#[path = "../src/oracle.rs"]
mod oracle;
#[expect(dead_code, reason = "the server uses the other items")]
#[path = "../../src/plain_request.rs"]
mod plain_request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    oracle::check(data);
});
