//! Values and texts that need no browser, so that they are tested on the host.

pub mod address;
pub mod audit;
pub mod bucket;
pub mod bulk;
pub mod command;
pub mod csv;
pub mod form;
pub mod limits;
pub mod policy;
pub mod text;
