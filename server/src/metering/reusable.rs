//! Space for the records of tenants that may not record more denials now.
//!
//! Such a tenant's request needs space before its decision like any other, but it is probably denied, and then no
//! record is written. If each of these requests left void space behind, that space would fill the backlog like the
//! records that it replaces. So the space remains open, and the next such request uses it. The shipper cannot read past
//! open space; at the beginning of each pass, it voids the space that no request is using.

use parking_lot::Mutex;

use super::segment::ReservedRecord;

/// Space that is large enough for every record.
#[derive(Debug)]
pub(super) struct ReusableSpace {
    pub record: ReservedRecord,
    /// The pass of the shipper during which it was reserved.
    pass: u64,
}

#[derive(Debug, Default)]
pub(super) struct Reusable(Mutex<Unused>);

#[derive(Debug, Default)]
struct Unused {
    /// The current pass.
    pass: u64,
    /// Reserved during the current pass.
    records: Vec<ReservedRecord>,
}

impl Reusable {
    /// Returns unused space, or otherwise reserves some.
    pub fn take<E>(
        &self,
        reserve: impl FnOnce() -> Result<ReservedRecord, E>,
    ) -> Result<ReusableSpace, E> {
        let (found, pass) = {
            let mut unused = self.0.lock();
            // A record in a broken segment could not be made durable.
            unused.records.retain(|it| !it.segment.is_broken());
            (unused.records.pop(), unused.pass)
        };
        let record = match found {
            Some(record) => record,
            None => reserve()?,
        };
        Ok(ReusableSpace { record, pass })
    }

    /// Keeps the space for another request, unless it holds up the shipper.
    pub fn give_back(&self, space: ReusableSpace) {
        let mut unused = self.0.lock();
        if space.pass == unused.pass {
            unused.records.push(space.record);
        }
    }

    /// Begins the shipper's next pass. Voids all unused space.
    pub fn begin_pass(&self) {
        let mut unused = self.0.lock();
        unused.pass += 1;
        unused.records.clear();
    }
}
