use serde_json::{Value, json};

use super::*;

fn line(path: &str) -> AccessLine<'_> {
    AccessLine {
        at: UnixNanos(1_785_738_360_007_999_999),
        request_id: "019ab4e1-7c00-7000-8000-0000000000a1",
        method: "GET",
        path,
        status: 200,
        micros: 41,
        ip: None,
        tenant: None,
        key: None,
    }
}

fn json(line: &AccessLine<'_>) -> Value {
    let mut out = Vec::new();
    let mut second = Second::NONE;
    line.json(second.of(line.at), &mut out).unwrap();
    assert_eq!(out.pop(), Some(b'\n'));
    assert!(!out.contains(&b'\n'));
    serde_json::from_slice(&out).expect("a line is JSON")
}

#[test]
fn access_line_is_valid_json_for_any_path() {
    for path in ["/v1/echo", "/\"},{\"", "/\\", "/a\nb", "/ä"] {
        let written = json(&line(path));
        let meant = json!({
            "timestamp": "2026-08-03T06:26:00.007Z",
            "level": "INFO",
            "target": "quota_server::access",
            "request_id": "019ab4e1-7c00-7000-8000-0000000000a1",
            "method": "GET",
            "path": path,
            "status": 200,
            "micros": 41,
        });
        assert_eq!(written, meant);
    }
}

#[test]
fn access_line_shortens_long_paths_and_methods() {
    for (path, written) in [
        ("/".repeat(256), "/".repeat(256)),
        ("/".repeat(3900), format!("{}…", "/".repeat(253))),
        // Paths are cut between characters: the 253rd byte is the first half of a character, which is left out.
        (
            format!("//{}", "ä".repeat(2000)),
            format!("//{}…", "ä".repeat(125)),
        ),
    ] {
        assert_eq!(json(&line(&path))["path"], written.as_str());
        let mut out = Vec::new();
        line(&path).text("2026", &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains(&format!(" {written} 200 ")), "{text}");
    }
    let method = "M".repeat(3900);
    let written = json(&AccessLine {
        method: &method,
        ..line("/")
    });
    assert_eq!(written["method"], format!("{}…", "M".repeat(29)).as_str());
}

/// An output that does not accept anything until it is opened.
#[derive(Debug, Clone, Default)]
struct Valve(Arc<ValveState>);

#[derive(Debug, Default)]
struct ValveState {
    is_open: Mutex<bool>,
    opened: Condvar,
    written: Mutex<Vec<u8>>,
}

impl Write for Valve {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut is_open = self.0.is_open.lock();
        self.0.opened.wait_while(&mut is_open, |is_open| !*is_open);
        self.0.written.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Valve {
    fn open(&self) {
        *self.0.is_open.lock() = true;
        self.0.opened.notify_all();
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.written.lock().clone()).unwrap()
    }
}

#[test]
fn blocked_output_blocks_no_caller_and_every_line_is_written_or_counted() {
    const LINES: u64 = 60_000;
    let valve = Valve::default();
    let log = Log::start_on(valve.clone(), LogFormat::Json);
    for _ in 0..LINES {
        log.access(&line("/v1/echo"));
    }
    // There is still room for a limited number of events.
    log.event(b"{\"event\":1}\n");
    let lines_dropped = log.dropped().get();
    assert!(lines_dropped > 0);
    let large = "x".repeat(64 * 1024);
    for _ in 0..64 {
        log.event(large.as_bytes());
    }
    let dropped = log.dropped().get();
    assert!(dropped > lines_dropped);
    assert!(log.state.buffer.lock().bytes.len() <= MAX_WAITING_EVENTS);
    // Even while output is blocked, stopping does not take long.
    let began = std::time::Instant::now();
    log.clone().stop();
    assert!(began.elapsed() < 10 * STOP_WITHIN);

    valve.open();
    log.stop();
    let text = valve.text();
    let written = text.matches("\"path\":\"/v1/echo\"").count() as u64;
    assert_eq!(written + lines_dropped, LINES);
    assert!(text.contains("{\"event\":1}\n"));
}

#[test]
fn event_and_all_lines_before_it_are_written_without_delay() {
    let valve = Valve::default();
    valve.open();
    let log = Log::start_on(valve.clone(), LogFormat::Json);
    log.access(&line("/first"));
    log.event(b"second\n");
    log.stop();
    let text = valve.text();
    assert!(text.find("/first").unwrap() < text.find("second").unwrap());
}

#[test]
fn access_line_has_the_client_tenant_and_key_if_known() {
    let tenant = uuid::Uuid::from_u128(7);
    let known = AccessLine {
        ip: Some("2001:db8::5".parse().unwrap()),
        tenant: Some(tenant),
        key: Some(b"qk_abcdefgh"),
        ..line("/")
    };
    let written = json(&known);
    assert_eq!(written["ip"], "2001:db8::5");
    let ip = Some("203.0.113.7".parse().unwrap());
    assert_eq!(json(&AccessLine { ip, ..line("/") })["ip"], "203.0.113.7");
    assert_eq!(written["tenant"], tenant.to_string());
    assert_eq!(written["key"], "qk_abcdefgh");
}

#[test]
fn second_is_formatted_again_when_it_changes() {
    let mut second = Second::NONE;
    assert_eq!(second.of(UnixNanos(0)), "1970-01-01T00:00:00");
    assert_eq!(second.of(UnixNanos(999_999_999)), "1970-01-01T00:00:00");
    assert_eq!(second.of(UnixNanos(1_000_000_000)), "1970-01-01T00:00:01");
    assert_eq!(second.of(UnixNanos(0)), "1970-01-01T00:00:00");
}
