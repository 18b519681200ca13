//! A gauge that may have no value.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder},
    metrics::MetricType,
};

/// The result of a repeated measurement. Without a result, the metric is listed without a value, so that an alert does
/// not read an outdated one. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub struct MeasuredGauge(Arc<Mutex<Option<i64>>>);

impl MeasuredGauge {
    /// Replaces the value. `None` means that the last measurement has failed.
    pub fn set(&self, value: Option<i64>) {
        *self.0.lock() = value;
    }
}

impl EncodeMetric for MeasuredGauge {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let value = *self.0.lock();
        value.map_or(Ok(()), |value| encoder.encode_gauge(&value))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}
