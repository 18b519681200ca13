//! Replays the corpus of the fuzz target. Some of its inputs are cases of the differential test. `FUZZ_CORPUS=write`
//! writes these cases to the corpus.

use std::{fs, path::Path};

use quota_server::{
    plain_request,
    secret_text::{Kind, SecretText},
};

use super::{
    grammar::{Case, case},
    pair::World,
};

#[path = "../../../fuzz/src/oracle.rs"]
mod oracle;

/// The number of cases of the differential test in the corpus.
const CASES: u64 = 100;
/// Longer cases would slow down the fuzzer.
const LENGTH_MAX: usize = 2000;

fn folder() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fuzz/corpus/plain_request"
    ))
}

/// Returns a case in the form that the fuzz target expects.
fn encoded(case: &Case) -> Vec<u8> {
    let cuts = case.cuts.iter().filter_map(|&cut| u16::try_from(cut).ok());
    let cuts = cuts.take(8).collect::<Vec<_>>();
    let mut data = vec![u8::try_from(cuts.len()).expect("at most eight")];
    data.extend(cuts.iter().flat_map(|cut| cut.to_be_bytes()));
    data.extend_from_slice(&case.bytes);
    data
}

#[test]
fn corpus_is_read_as_hyper_reads_it() {
    let secret = |kind, n| SecretText::from_bytes(kind, &[n; 32]).reveal();
    let world = World {
        keys: [1, 2, 3, 4, 5, 6].map(|n| secret(Kind::ApiKey, n)),
        token: secret(Kind::ServiceToken, 1),
        bad_tokens: [2, 3, 4].map(|n| secret(Kind::ServiceToken, n)),
    };
    let cases = (0..).map(|seed| case(seed, &world));
    let cases = cases.filter(|case| case.bytes.len() <= LENGTH_MAX);
    #[expect(
        clippy::disallowed_methods,
        reason = "this is not a setting of the server"
    )]
    let is_to_write = std::env::var_os("FUZZ_CORPUS").is_some_and(|it| it == "write");
    for (n, case) in (0..CASES).zip(cases) {
        let (file, data) = (folder().join(format!("case-{n:02}")), encoded(&case));
        if is_to_write {
            fs::write(&file, &data).expect("the file is written");
        }
        let found = fs::read(&file).unwrap_or_default();
        assert!(found == data, "FUZZ_CORPUS=write writes {}", file.display());
    }
    let (mut inputs, mut requests) = (0, 0);
    for entry in fs::read_dir(folder()).expect("the corpus is there") {
        let data = fs::read(entry.expect("a file").path()).expect("the file is read");
        requests += oracle::check(&data);
        inputs += 1;
    }
    println!("{inputs} inputs, {requests} plain requests");
    assert!(requests > inputs / 2, "{requests}");
}
