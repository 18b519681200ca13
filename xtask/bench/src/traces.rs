//! The cost of traces: compares servers that trace different fractions of their requests, in the same run.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{
    comparison::{Case, compare},
    process::Cores,
};

pub(crate) fn run(quota: &Path, rounds: u32, time: Duration) -> Result<()> {
    let cores = Cores::pick();
    let case = |name, settings: &[(&str, String)]| Case::start(quota, cores, name, settings);
    let off = case("off", &[])?;
    // Start the collector after the first server. Starting a server pins this thread to the core of the load, and the
    // collector inherits this core.
    let collector = Collector::start()?;
    let traced = |name, ratio: &str| {
        let settings = [
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                format!("http://{}", collector.addr),
            ),
            ("OTEL_TRACES_SAMPLER_ARG", ratio.to_owned()),
        ];
        case(name, &settings)
    };
    let cases = [
        off,
        traced("on, 0%", "0")?,
        traced("on, 1%", "0.01")?,
        traced("on, 10%", "0.1")?,
    ];
    compare("traces", &cases, rounds, time)?;
    let bytes = collector.received.load(Ordering::Relaxed);
    ensure!(bytes > 0, "the collector received no spans");
    println!("The collector received {bytes} bytes. Target at 1%: at most 1.02.");
    Ok(())
}

/// Accepts all spans and discards them.
struct Collector {
    addr: SocketAddr,
    /// The number of bytes received.
    received: Arc<AtomicU64>,
}

impl Collector {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let collector = Self {
            addr: listener.local_addr()?,
            received: Arc::default(),
        };
        let received = Arc::clone(&collector.received);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let received = Arc::clone(&received);
                std::thread::spawn(move || serve(&stream, &received));
            }
        });
        Ok(collector)
    }
}

/// Responds to the requests on a connection until it is closed.
fn serve(mut stream: &TcpStream, received: &AtomicU64) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line == "\r\n" {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        received.fetch_add(length as u64, Ordering::Relaxed);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    }
}
