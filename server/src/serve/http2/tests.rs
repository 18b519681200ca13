use super::*;

const PING: u8 = 6;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Both directions of a connection, in simulated time.
#[derive(Default)]
struct Wire {
    requests: Requests,
    received: Frames,
    sent: Frames,
}

impl Wire {
    fn receive(&mut self, at: u64, bytes: &[u8]) {
        let requests = &mut self.requests;
        self.received
            .scan(bytes, |event| requests.received(event, at));
    }

    fn send(&mut self, at: u64, bytes: &[u8]) {
        let requests = &mut self.requests;
        self.sent
            .scan(bytes, |event| requests.sent(event, at, PROGRESS));
    }

    fn request(&mut self, at: u64, stream: u32) {
        self.receive(
            at,
            &frame(HEADERS, END_HEADERS | END_STREAM, stream, b"head"),
        );
    }

    fn begin_response(&mut self, at: u64, stream: u32) {
        self.send(at, &frame(HEADERS, END_HEADERS, stream, b"head"));
    }

    fn waits_since(&self) -> Option<u64> {
        self.requests.waiting().response
    }
}

#[test]
fn frames_are_found_for_any_split_of_the_bytes() {
    let bytes = [
        frame(HEADERS, END_HEADERS, 1, b"head"),
        frame(PING, 0, 0, &[9; 8]),
        frame(DATA, END_STREAM, 1, b""),
        frame(DATA, 0, u32::MAX, &[9; 300]),
    ]
    .concat();
    let found = |size: usize| {
        let (mut frames, mut events) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(size) {
            frames.scan(piece, |event| events.push(event));
        }
        events
    };
    let whole = found(bytes.len());
    let heads = whole.iter().filter_map(|event| match event {
        Event::Ended(frame) => Some((frame.kind, frame.flags, frame.stream, frame.length)),
        Event::Began(_) => None,
    });
    assert_eq!(
        heads.collect::<Vec<_>>(),
        [
            (HEADERS, END_HEADERS, 1, 4),
            (PING, 0, 0, 8),
            (DATA, END_STREAM, 1, 0),
            (DATA, 0, u32::MAX >> 1, 300),
        ]
    );
    for size in 1..bytes.len() {
        assert_eq!(found(size), whole, "{size}");
    }
}

#[test]
fn response_waits_from_its_head_to_its_end() {
    let mut wire = Wire::default();
    wire.request(10, 1);
    assert_eq!(wire.waits_since(), None, "its handler runs");
    assert!(wire.requests.waiting().has_open);
    wire.begin_response(20, 1);
    assert_eq!(wire.waits_since(), Some(20));
    wire.send(30, &frame(DATA, END_STREAM, 1, b"here"));
    assert_eq!(wire.waits_since(), None);
    let waiting = wire.requests.waiting();
    assert!(!waiting.has_open);
    assert_eq!(waiting.progressed, 30);
}

#[test]
fn response_without_a_body_never_waits() {
    let mut wire = Wire::default();
    wire.request(10, 1);
    wire.send(20, &frame(HEADERS, END_HEADERS | END_STREAM, 1, b"head"));
    assert_eq!(wire.waits_since(), None);
    assert!(!wire.requests.waiting().has_open);
}

#[test]
fn single_bytes_are_no_progress_and_a_kilobyte_is() {
    let mut wire = Wire::default();
    wire.request(1, 1);
    wire.begin_response(2, 1);
    for at in 3..1026 {
        wire.send(at, &frame(DATA, 0, 1, b"x"));
        assert_eq!(wire.waits_since(), Some(2));
    }
    wire.send(2000, &frame(DATA, 0, 1, b"x"));
    assert_eq!(wire.waits_since(), Some(2000));
}

#[test]
fn resetting_a_response_does_not_end_its_wait_but_reading_another_does() {
    for by_client in [true, false] {
        let mut wire = Wire::default();
        wire.request(1, 1);
        wire.begin_response(2, 1);
        let reset = frame(RST_STREAM, 0, 1, &[0; 4]);
        if by_client {
            wire.receive(50, &reset);
        } else {
            wire.send(50, &reset);
        }
        assert_eq!(wire.waits_since(), Some(2));
        // Responses that flow control cannot block do not show that the client is reading.
        wire.request(60, 3);
        wire.send(61, &frame(HEADERS, END_HEADERS | END_STREAM, 3, b"head"));
        wire.request(62, 5);
        wire.begin_response(63, 5);
        wire.send(64, &frame(DATA, END_STREAM, 5, b""));
        assert_eq!(wire.waits_since(), Some(2));
        wire.request(70, 7);
        wire.begin_response(71, 7);
        wire.send(72, &frame(DATA, END_STREAM, 7, b"here"));
        assert_eq!(wire.waits_since(), None);
    }
}

#[test]
fn each_response_waits_separately() {
    let mut wire = Wire::default();
    for stream in [1, 3] {
        wire.request(1, stream);
        wire.begin_response(u64::from(stream) + 1, stream);
    }
    wire.send(50, &frame(DATA, 0, 3, &[0; 2000]));
    assert_eq!(wire.waits_since(), Some(2));
    wire.send(60, &frame(DATA, END_STREAM, 1, b"here"));
    assert_eq!(wire.waits_since(), Some(50));
}

#[test]
fn canceling_unanswered_requests_counts_until_one_is_answered() {
    let mut wire = Wire::default();
    for at in (10..100).step_by(10) {
        let stream = u32::try_from(at).unwrap() + 1;
        wire.request(at, stream);
        wire.receive(at + 1, &frame(RST_STREAM, 0, stream, &[0; 4]));
        assert_eq!(wire.waits_since(), Some(10));
    }
    assert!(!wire.requests.waiting().has_open);
    assert_eq!(wire.requests.waiting().progressed, 0);
    wire.request(200, 201);
    wire.send(201, &frame(HEADERS, END_HEADERS | END_STREAM, 201, b""));
    assert_eq!(wire.waits_since(), None);
}

#[test]
fn request_head_is_open_until_its_last_frame_is_complete() {
    let mut wire = Wire::default();
    let head = frame(HEADERS, END_STREAM, 1, b"the first part");
    wire.receive(10, &head[..9]);
    assert_eq!(wire.requests.waiting().head, Some(10));
    wire.receive(20, &head[9..]);
    let last = frame(CONTINUATION, END_HEADERS, 1, b"the rest");
    wire.receive(30, &last[..last.len() - 1]);
    assert_eq!(wire.requests.waiting().head, Some(10));
    assert!(!wire.requests.waiting().has_open);
    wire.receive(40, &last[last.len() - 1..]);
    assert_eq!(wire.requests.waiting().head, None);
    assert!(wire.requests.waiting().has_open);
    // Trailers do not open a request.
    wire.send(50, &frame(HEADERS, END_HEADERS | END_STREAM, 1, b""));
    wire.receive(60, &frame(HEADERS, END_HEADERS | END_STREAM, 1, b""));
    assert!(!wire.requests.waiting().has_open);
}

#[test]
fn number_of_tracked_requests_is_bounded() {
    let mut wire = Wire::default();
    for n in 0..1000 {
        wire.request(1, 2 * n + 1);
    }
    assert_eq!(wire.requests.open.len(), REMEMBERED);
}
