//! Tests the log on standard output, with the real process.

use std::{
    io::{BufRead as _, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    time::Duration,
};

use reqwest::Client;
use serde_json::{Value, json};

use crate::support::{
    app::PASSWORD,
    quota::{Quota, data_dir},
};

/// The length of the path in each request. The log shortens the path.
const LONG_PATH: usize = 3_900;
/// The number of requests. They log more lines than the buffer and the pipe can hold together.
const REQUESTS: usize = 20_000;
const BATCH: usize = 100;
/// A time limit that is long enough for a busy machine.
const AT_MOST: Duration = Duration::from_secs(60);

/// Sends requests over several connections, one after another. Returns the number of 404 responses.
fn get_many(server: SocketAddr, path: &str) -> usize {
    let mut answered = 0;
    for _ in 0..REQUESTS / BATCH {
        let mut stream = TcpStream::connect(server).expect("the server listens");
        let patience = Some(AT_MOST);
        stream.set_read_timeout(patience).expect("a socket");
        let request = format!("GET {path} HTTP/1.1\r\nHost: q\r\n\r\n");
        let last = format!("GET {path} HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n");
        let (mut reader, requests) = (
            stream.try_clone().expect("a socket"),
            request.repeat(BATCH - 1) + &last,
        );
        let writer = std::thread::spawn(move || stream.write_all(requests.as_bytes()));
        let mut answers = Vec::new();
        reader
            .read_to_end(&mut answers)
            .expect("the server responds");
        writer
            .join()
            .expect("the thread does not panic")
            .expect("the server reads");
        answered += String::from_utf8_lossy(&answers)
            .matches("HTTP/1.1 404 ")
            .count();
    }
    answered
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_reader_of_standard_output_stops_no_request() {
    let (data, http) = (data_dir(), Client::new());
    let settings = [
        ("RUST_LOG", "info"),
        ("QUOTA_HEADER_TIMEOUT", "60s"),
        ("QUOTA_DATABASE_WAIT", "10s"),
        ("QUOTA_DATABASE_STATEMENT_TIMEOUT", "30s"),
    ];
    let (quota, out) = Quota::start_unread(data.path(), &settings);
    let (addr, path) = (quota.addr, format!("/{}", "p".repeat(LONG_PATH)));
    let answered = std::thread::spawn(move || get_many(addr, &path)).join();
    assert_eq!(answered.expect("every request gets a response"), REQUESTS);

    // Requests that log an event, such as a registration, are not blocked either.
    for n in 0..8 {
        let account = json!({"email": format!("{n}@example.com"), "password": PASSWORD});
        let url = format!("http://{}/auth/register", quota.addr);
        let answer = http.post(url).json(&account).timeout(AT_MOST);
        let status = answer.send().await.expect("the server responds").status();
        assert!([201, 429].contains(&status.as_u16()), "{status}");
    }
    let dropped = quota.counter(&http, "quota_log_lines_dropped_total").await;
    assert!(dropped > 0);

    // When the output is read again, a line reports how many lines are missing. All other lines are present.
    let (tell, is_reported) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let lines = out.lines().map_while(Result::ok);
        let lines = lines.map(|line| {
            let line = serde_json::from_str::<Value>(&line).expect(&line);
            if line["dropped"].is_u64() {
                let _ = tell.send(());
            }
            line
        });
        lines.collect::<Vec<_>>()
    });
    let is_reported = tokio::task::block_in_place(|| is_reported.recv_timeout(AT_MOST));
    is_reported.expect("a line reports the missing lines");
    let dropped = quota.counter(&http, "quota_log_lines_dropped_total").await;
    quota.stop();
    let lines = reader.join().expect("every line is JSON");
    let reported = lines.iter().filter_map(|line| line["dropped"].as_u64());
    assert_eq!(reported.sum::<u64>(), dropped);
    let requests = lines.iter().filter(|line| {
        let path = line["path"].as_str().unwrap_or_default();
        assert!(path.len() <= 256, "{path}");
        path.starts_with("/ppp")
    });
    let requests = requests.count() as u64;
    println!("{requests} lines written, {dropped} dropped");
    assert!(requests >= 1000, "{requests}");
    assert!(requests + dropped >= REQUESTS as u64);
    assert!(
        lines
            .iter()
            .any(|line| line["message"] == "user registered")
    );
}
