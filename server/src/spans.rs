//! Spans of traced requests, for OpenTelemetry.
//!
//! Spans are created only while a traced request is being served. For all other requests, code that could start a span
//! only reads a task-local variable. This module does not decide which requests are traced, and does not know where
//! spans are sent: see [`telemetry::traces`](crate::telemetry::traces).
//!
//! Spawned tasks do not inherit the current span. Code that spawns a task for a request passes the span to the task
//! with [`current`] and [`within`].

use std::{
    borrow::Cow,
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
};

pub use opentelemetry::trace::SpanKind;
use opentelemetry::{
    Context, KeyValue, Value,
    trace::{Span as _, SpanBuilder, Status, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::{SdkTracer, Span as SdkSpan};

tokio::task_local! {
    static CURRENT: Parent;
}

/// A span that can have children. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Parent(Arc<ParentState>);

#[derive(Debug)]
struct ParentState {
    tracer: SdkTracer,
    context: Context,
}

/// A span in progress. The span ends when this value is dropped.
#[derive(Debug)]
pub struct Span {
    /// Boxed to keep request futures small: most requests have no span.
    span: Box<SdkSpan>,
    as_parent: Parent,
}

impl Span {
    /// Starts a child of the span in `context`, or a new trace if `context` has no span.
    pub fn start(
        tracer: &SdkTracer,
        context: &Context,
        name: &'static str,
        kind: SpanKind,
    ) -> Self {
        let span = tracer.build_with_context(SpanBuilder::from_name(name).with_kind(kind), context);
        let as_parent = ParentState {
            tracer: tracer.clone(),
            context: Context::new().with_remote_span_context(span.span_context().clone()),
        };
        Self {
            span: Box::new(span),
            as_parent: Parent(Arc::new(as_parent)),
        }
    }

    pub fn as_parent(&self) -> &Parent {
        &self.as_parent
    }

    pub fn rename(&mut self, name: impl Into<Cow<'static, str>>) {
        self.span.update_name(name);
    }

    /// Sets an attribute. The value must not be a secret.
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        self.span.set_attribute(KeyValue::new(name, value));
    }

    /// Marks the operation as failed. The reason must not contain a secret.
    pub fn fail(&mut self, reason: impl Into<Cow<'static, str>>) {
        self.span.set_status(Status::error(reason));
    }
}

impl Parent {
    pub fn child(&self, name: &'static str, kind: SpanKind) -> Span {
        Span::start(&self.0.tracer, &self.0.context, name, kind)
    }
}

/// Returns the current span, or `None` if no traced request is being served.
pub fn current() -> Option<Parent> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Starts a child of the current span. Returns `None` if no traced request is being served.
pub fn child(name: &'static str, kind: SpanKind) -> Option<Span> {
    CURRENT.try_with(|parent| parent.child(name, kind)).ok()
}

/// Runs a future with `parent` as the current span, if there is one.
pub async fn within<T>(parent: Option<Parent>, work: impl Future<Output = T>) -> T {
    inside(parent.as_ref(), pin!(work)).await
}

/// Works like [`within`], but for a future that is already pinned. Pinning in place avoids moving a large future.
pub fn inside<F: Future>(
    parent: Option<&Parent>,
    mut work: Pin<&mut F>,
) -> impl Future<Output = F::Output> + Unpin {
    poll_fn(move |context| match parent {
        None => work.as_mut().poll(context),
        Some(parent) => CURRENT.sync_scope(parent.clone(), || work.as_mut().poll(context)),
    })
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;

    fn span() -> Span {
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        Span::start(&tracer, &Context::new(), "root", SpanKind::Server)
    }

    #[tokio::test]
    async fn children_exist_only_within_a_span_and_belong_to_its_trace() {
        assert!(child("none", SpanKind::Internal).is_none());
        let root = span();
        let child = within(Some(root.as_parent().clone()), async {
            tokio::task::yield_now().await;
            child("child", SpanKind::Internal)
        });
        let child = child.await.expect("there is a current span");
        let (root, child) = (root.span.span_context(), child.span.span_context());
        assert_eq!(root.trace_id(), child.trace_id());
        assert_ne!(root.span_id(), child.span_id());
        assert!(current().is_none());
    }

    #[tokio::test]
    async fn spawned_tasks_do_not_inherit_the_span() {
        let root = span();
        let inherits = within(Some(root.as_parent().clone()), async {
            let spawned = tokio::spawn(async { current().is_some() });
            spawned.await.expect("the task does not panic")
        });
        assert!(!inherits.await);
    }
}
