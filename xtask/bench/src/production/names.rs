//! A DNS server on a free loopback port, for the name that Caddy looks up to find the replicas.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::{net::UdpSocket, task::JoinHandle};

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;
/// The flags of a response from an authoritative server, without an error.
const RESPONSE: u16 = 0x8400;

pub(super) struct NameServer {
    pub(super) addr: SocketAddr,
    task: JoinHandle<()>,
}

impl NameServer {
    /// Starts the server. Every name resolves to these addresses.
    pub(super) async fn start(addresses: Vec<Ipv4Addr>) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = socket.local_addr()?;
        let task = tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
                    continue;
                };
                if let Some(response) = respond(&buffer[..length], &addresses) {
                    let _ = socket.send_to(&response, client).await;
                }
            }
        });
        Ok(Self { addr, task })
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Returns the response to a query for one name, or `None` for any other message.
fn respond(query: &[u8], addresses: &[Ipv4Addr]) -> Option<Vec<u8>> {
    let mut end = HEADER;
    loop {
        let label = usize::from(*query.get(end)?);
        end += 1 + label;
        if label == 0 {
            break;
        }
    }
    let number = |at: usize| Some(u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]));
    let (kind, class) = (number(end)?, number(end + 2)?);
    let question = query.get(HEADER..end + 4)?;
    let addresses = if (kind, class) == (TYPE_A, CLASS_IN) {
        addresses
    } else {
        &[]
    };
    let mut response = Vec::new();
    let count = u16::try_from(addresses.len()).ok()?;
    for number in [number(0)?, RESPONSE, 1, count, 0, 0] {
        response.extend(number.to_be_bytes());
    }
    response.extend(question);
    for address in addresses {
        // The name is a pointer to the name in the question. The address is valid for one second.
        response.extend([0xc0, 12]);
        response.extend([TYPE_A, CLASS_IN].map(u16::to_be_bytes).concat());
        response.extend(1_u32.to_be_bytes());
        response.extend(4_u16.to_be_bytes());
        response.extend(address.octets());
    }
    Some(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a query for `quota` with an additional record, as Go sends it.
    fn query(kind: u8) -> Vec<u8> {
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        query.extend(b"\x05quota\0");
        query.extend([0, kind, 0, 1]);
        query.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        query
    }

    #[test]
    fn every_address_is_in_the_response() {
        let addresses = [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];
        let response = respond(&query(1), &addresses).unwrap();
        assert_eq!(
            response[..12],
            [0xab, 0xcd, 0x84, 0, 0, 1, 0, 2, 0, 0, 0, 0]
        );
        assert_eq!(&response[12..23], b"\x05quota\0\0\x01\0\x01");
        let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 127, 0, 0];
        assert_eq!(
            response[23..],
            [&record[..], &[2], &record[..], &[3]].concat()
        );
    }

    #[test]
    fn other_queries_get_no_address() {
        let response = respond(&query(28), &[Ipv4Addr::LOCALHOST]).unwrap();
        assert_eq!(response.len(), 23);
        assert_eq!(response[7], 0);
        assert_eq!(respond(&query(1)[..15], &[Ipv4Addr::LOCALHOST]), None);
    }
}
