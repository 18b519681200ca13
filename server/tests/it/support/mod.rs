//! Test support.

pub(crate) mod app;
pub(crate) mod authority;
pub(crate) mod caddy;
pub(crate) mod collector;
pub(crate) mod grpc;
pub(crate) mod hooks;
pub(crate) mod http2;
pub(crate) mod locks;
pub(crate) mod postgres;
pub(crate) mod quota;
pub(crate) mod stripe;

/// Defines one test for each combination of a scenario and a program, in one module per program. A scenario is a
/// function that takes a program.
macro_rules! test_with_each_program {
    ({ $($module:ident: $program:ident,)+ } $scenarios:tt) => {
        $(mod $module {
            crate::support::test_with_program! { $program $scenarios }
        })+
    };
}

macro_rules! test_with_program {
    ($program:ident { $($scenario:ident)+ }) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $scenario() {
            super::$scenario(super::Program::$program).await;
        })+
    };
}

/// Defines each test twice: with direct responses turned on, and with them turned off. A test is a function that takes
/// the value of the setting, `"on"` or `"off"`.
macro_rules! test_with_and_without_direct_responses {
    ($($test:ident),+ $(,)?) => {
        mod with_direct_responses {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test("on").await;
            })+
        }

        mod without_direct_responses {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test("off").await;
            })+
        }
    };
}

pub(crate) use {
    test_with_and_without_direct_responses, test_with_each_program, test_with_program,
};
