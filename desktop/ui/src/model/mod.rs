//! Values and texts that can be tested natively, because they do not need a browser.

pub mod address;
pub mod alert;
pub mod attention;
pub mod audit;
pub mod billing;
pub mod bucket;
pub mod bulk;
pub mod burn_down;
pub mod chart;
pub mod command;
pub mod csv;
pub mod decision;
pub mod form;
pub mod key;
pub mod limits;
pub mod markup;
pub mod messages;
pub mod meter;
pub mod money;
pub mod payload;
pub mod policy;
pub mod role;
pub mod text;
pub mod usage;
pub mod webhook;
pub mod zoned;
