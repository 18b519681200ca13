//! Reusable space for the usage records of tenants whose denials are currently not recorded.
//!
//! Like any other request, a request of such a tenant needs space before its decision. If the request is denied, which
//! is likely, no record is written. If each of these requests left void space behind, the void space would fill the
//! backlog just as records would. Therefore, the space stays open, and the next request of such a tenant uses it. The
//! shipper cannot read past open space, so at the start of each pass, the shipper voids the space that no request is
//! using.

use parking_lot::Mutex;

use super::segment::ReservedRecord;

/// Space for a record of maximum length.
#[derive(Debug)]
pub(super) struct ReusableSpace {
    pub record: ReservedRecord,
    /// The number of the shipper's pass during which the space was taken.
    pass: u64,
}

#[derive(Debug, Default)]
pub(super) struct Reusable(Mutex<Unused>);

#[derive(Debug, Default)]
struct Unused {
    /// The number of the shipper's current pass.
    pass: u64,
    /// Unused space from the current pass.
    records: Vec<ReservedRecord>,
}

impl Reusable {
    /// Returns unused space, or reserves space if there is no unused space.
    pub fn take<E>(
        &self,
        reserve: impl FnOnce() -> Result<ReservedRecord, E>,
    ) -> Result<ReusableSpace, E> {
        let (found, pass) = {
            let mut unused = self.0.lock();
            // Space in broken segments is discarded, because a record there could not be made durable.
            unused.records.retain(|it| !it.segment.is_broken());
            (unused.records.pop(), unused.pass)
        };
        let record = match found {
            Some(record) => record,
            None => reserve()?,
        };
        Ok(ReusableSpace { record, pass })
    }

    /// Keeps the space for another request if the space is from the current pass. Otherwise, voids the space, because
    /// it would delay the shipper.
    pub fn give_back(&self, space: ReusableSpace) {
        let mut unused = self.0.lock();
        if space.pass == unused.pass {
            unused.records.push(space.record);
        }
    }

    /// Begins the shipper's next pass, and voids all unused space.
    pub fn begin_pass(&self) {
        let mut unused = self.0.lock();
        unused.pass += 1;
        unused.records.clear();
    }
}
