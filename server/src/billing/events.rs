//! Webhooks from Stripe. They are stored on arrival and processed later.
//!
//! Quota never applies the contents of an event. Regardless of its type, version, and age, an event only causes a read
//! from Stripe: of its customer's subscriptions or, if it reports problems with usage, of these problems.

use std::collections::BTreeSet;

use futures_util::{StreamExt, stream};
use quota_common::TenantId;
use uuid::Uuid;

use super::{Billing, BillingError};
use crate::{
    db::{DbError, SystemTx},
    error_chain::chain,
    repo::{
        billing,
        billing_event::{self, DueEvent, NewEvent, Outcome},
        invalidation::Invalidation,
    },
    stripe::{Envelope, METER_EVENTS},
};

/// The maximum number of events processed together.
const BATCH: i64 = 100;
/// An event is abandoned after this many attempts, which take about 20 hours. Customers are also read regularly,
/// without an event.
const ATTEMPTS_MAX: i32 = 35;
/// The maximum number of customers read concurrently.
const CONCURRENT: usize = 8;
/// How often a customer with a subscription is read without an event, in seconds. If a webhook is lost, the change that
/// it would have reported takes effect after about this time.
const READ_EVERY: f64 = 600.0;
/// The maximum number of customers read per round.
const READS: i64 = 20;

/// The result of [`Billing::handle_due`] or [`Billing::read_due`].
#[derive(Debug, Default)]
pub struct Round {
    /// The number of events that were due.
    pub events: usize,
    /// The number of abandoned events.
    pub failed: usize,
    /// The number of failed reads from Stripe.
    pub read_errors: usize,
    /// The number of usage reports in which Stripe found an error.
    pub meter_errors: u64,
    /// Invalidations to publish.
    pub invalidations: Vec<Invalidation>,
}

impl Billing {
    /// Stores an event whose signature is valid. Returns `false` if it was already stored.
    pub async fn receive(&self, event: &Envelope, body: &str) -> Result<bool, DbError> {
        let new = NewEvent {
            id: &event.id,
            kind: &event.kind,
            object_id: event.object.as_deref(),
            customer_id: event.customer.as_deref(),
            api_version: event.api_version.as_deref(),
            livemode: event.livemode,
            body,
        };
        self.db
            .in_system(async |tx| billing_event::insert(tx, &new).await)
            .await
    }

    /// Processes events that are due. Events about the same tenant's subscriptions share a single read.
    pub async fn handle_due(&self) -> Result<Round, DbError> {
        if let Some(round) = self.postponed().await? {
            return Ok(round);
        }
        let due = self
            .db
            .in_system(async |tx| billing_event::claim(tx, BATCH).await)
            .await?;
        let mut round = Round {
            events: due.len(),
            ..Round::default()
        };
        let mut by_tenant: Vec<(TenantId, Vec<DueEvent>)> = Vec::new();
        for event in due {
            if event.livemode == self.is_live && METER_EVENTS.contains(&event.kind.as_str()) {
                match self.record_meter_errors(&event).await {
                    Ok(count) => {
                        round.meter_errors += count;
                        self.finish(&[event], Outcome::Applied, None).await?;
                    }
                    // Stripe deletes events after 30 days.
                    Err(BillingError::Stripe(error)) if error.is_not_found() => {
                        self.finish(&[event], Outcome::Ignored, None).await?;
                    }
                    Err(error) => self.postpone(&[event], &error, &mut round).await?,
                }
                continue;
            }
            match self.tenant_of(&event).await {
                Ok(Some(tenant)) => {
                    match by_tenant.iter_mut().find(|(other, _)| *other == tenant) {
                        Some((_, events)) => events.push(event),
                        None => by_tenant.push((tenant, vec![event])),
                    }
                }
                Ok(None) => self.finish(&[event], Outcome::Ignored, None).await?,
                Err(error) => self.postpone(&[event], &error, &mut round).await?,
            }
        }
        let reads = by_tenant.into_iter().map(async |(tenant, events)| {
            let read = self.read(tenant).await;
            (events, read)
        });
        let mut reads = stream::iter(reads).buffer_unordered(CONCURRENT);
        while let Some((events, read)) = reads.next().await {
            match read {
                Ok(invalidation) => {
                    round.invalidations.extend(invalidation);
                    self.finish(&events, Outcome::Applied, None).await?;
                }
                Err(error) => self.postpone(&events, &error, &mut round).await?,
            }
        }
        Ok(round)
    }

    /// If Stripe cannot be read at the moment, returns a round that processes nothing. Events and customers then remain
    /// due.
    async fn postponed(&self) -> Result<Option<Round>, DbError> {
        let read_errors = match self.verify_account().await {
            Ok(_) => return Ok(None),
            Err(BillingError::Db(error)) => return Err(error),
            // This case has its own metric.
            Err(BillingError::OtherAccount(_)) => 0,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "cannot read the Stripe account");
                1
            }
        };
        Ok(Some(Round {
            read_errors,
            ..Round::default()
        }))
    }

    /// Reads customers whose last read was too long ago.
    pub async fn read_due(&self) -> Result<Round, DbError> {
        if let Some(round) = self.postponed().await? {
            return Ok(round);
        }
        let due = self
            .db
            .in_system(async |tx| billing::claim_due_reads(tx, READ_EVERY, READS).await)
            .await?;
        let mut round = Round::default();
        for tenant in due {
            match self.read(tenant).await {
                Ok(invalidation) => round.invalidations.extend(invalidation),
                Err(error) => {
                    round.read_errors += 1;
                    tracing::warn!(%tenant, error = %chain(&error), "cannot read subscriptions from Stripe");
                }
            }
        }
        Ok(round)
    }

    /// Records the problems that an event reports, for each tenant affected. Returns the number of problems.
    async fn record_meter_errors(&self, event: &DueEvent) -> Result<u64, BillingError> {
        let errors = self.stripe.meter_errors(&event.id).await?;
        let mut found = Vec::new();
        let mut count = 0;
        for error in errors {
            count += error.count;
            // An identifier starts with the tenant's ID.
            let tenants: BTreeSet<Uuid> = error
                .identifiers
                .iter()
                .filter_map(|it| Uuid::try_parse(it.get(..36)?).ok())
                .collect();
            tracing::error!(
                event = event.id, code = error.code, count = error.count, identifiers = ?error.identifiers,
                "Stripe found errors in reported usage"
            );
            found.extend(
                tenants
                    .into_iter()
                    .map(|tenant| (tenant, error.code.clone())),
            );
        }
        let record = async |tx: &mut SystemTx| {
            for (tenant, code) in &found {
                billing_event::insert_meter_error(tx, &event.id, *tenant, code).await?;
            }
            Ok(())
        };
        self.db.in_system(record).await?;
        Ok(count)
    }

    /// Returns the tenant that an event affects.
    async fn tenant_of(&self, event: &DueEvent) -> Result<Option<TenantId>, BillingError> {
        // Sandbox events do not affect live subscriptions, and vice versa.
        if event.livemode != self.is_live {
            return Ok(None);
        }
        let customer = match (&event.customer_id, &event.object_id) {
            (Some(customer), _) => Some(customer.clone()),
            (None, Some(object)) if object.starts_with("cus_") => Some(object.clone()),
            (None, Some(object)) => self.stripe.customer_of(object).await?,
            (None, None) => None,
        };
        let Some(customer) = customer else {
            return Ok(None);
        };
        let tenant = self
            .db
            .in_system(async |tx| billing::tenant_of(tx, &customer).await)
            .await?;
        Ok(tenant)
    }

    async fn finish(
        &self,
        events: &[DueEvent],
        outcome: Outcome,
        error: Option<&str>,
    ) -> Result<(), DbError> {
        let ids: Vec<&str> = events.iter().map(|event| event.id.as_str()).collect();
        self.db
            .in_system(async |tx| billing_event::finish(tx, &ids, outcome, error).await)
            .await
    }

    /// Postpones events to a later attempt, or abandons them.
    async fn postpone(
        &self,
        events: &[DueEvent],
        error: &BillingError,
        round: &mut Round,
    ) -> Result<(), DbError> {
        let error = chain(error);
        let (last, again): (Vec<_>, Vec<_>) = events
            .iter()
            .cloned()
            .partition(|event| event.attempts >= ATTEMPTS_MAX);
        round.read_errors += 1;
        round.failed += last.len();
        for event in &last {
            tracing::error!(
                event = event.id,
                kind = event.kind,
                error,
                "abandoned a Stripe event"
            );
        }
        if !last.is_empty() {
            self.finish(&last, Outcome::Failed, Some(&error)).await?;
        }
        if !again.is_empty() {
            let ids: Vec<&str> = again.iter().map(|event| event.id.as_str()).collect();
            tracing::warn!(
                events = ids.len(),
                error,
                "cannot process Stripe events, retrying later"
            );
            self.db
                .in_system(async |tx| billing_event::postpone(tx, &ids, &error).await)
                .await?;
        }
        Ok(())
    }
}
