//! What is shown, before it is shown: without a browser, so that it is tested on the host.

pub mod address;
pub mod bucket;
pub mod bulk;
pub mod command;
pub mod form;
pub mod text;
