//! Complete objects, with every field that Stripe sends.

use serde_json::{Value, json};

use crate::state::{API_VERSION, text};

/// Returns the parameter, or null if the parameter is missing.
fn optional(params: &Value, name: &str) -> Value {
    params.get(name).cloned().unwrap_or(Value::Null)
}

/// Returns the `metadata` parameter, or an empty object if the parameter is missing.
fn metadata(params: &Value) -> Value {
    params.get("metadata").cloned().unwrap_or_else(|| json!({}))
}

fn is_true(params: &Value, name: &str) -> bool {
    params[name] == "true"
}

pub fn list(url: &str, data: &[Value], has_more: bool) -> Value {
    json!({"object": "list", "url": url, "has_more": has_more, "data": data})
}

pub fn account(id: Option<&str>) -> Value {
    json!({
        "id": id.unwrap_or("acct_fake"), "object": "account", "business_profile": {"name": "Fake"},
        "business_type": null, "capabilities": {}, "charges_enabled": true, "country": "US",
        "default_currency": "usd", "details_submitted": true, "email": "fake@example.com", "payouts_enabled": true,
        "settings": {}, "type": "standard",
    })
}

pub fn customer(id: &str, now: i64, params: &Value) -> Value {
    json!({
        "id": id, "object": "customer", "address": null, "balance": 0, "created": now, "currency": null,
        "default_source": null, "delinquent": false, "description": optional(params, "description"),
        "discount": null, "email": optional(params, "email"), "invoice_prefix": "FAKE",
        "invoice_settings": {
            "custom_fields": null, "default_payment_method": null, "footer": null, "rendering_options": null,
        },
        "livemode": false, "metadata": metadata(params), "name": optional(params, "name"), "next_invoice_sequence": 1,
        "phone": null, "preferred_locales": [], "shipping": null, "tax_exempt": "none", "test_clock": null,
    })
}

pub fn product(id: &str, now: i64, params: &Value) -> Value {
    json!({
        "id": id, "object": "product", "active": true, "attributes": [], "created": now, "default_price": null,
        "description": optional(params, "description"), "images": [], "livemode": false, "marketing_features": [],
        "metadata": metadata(params), "name": params["name"], "package_dimensions": null, "shippable": null,
        "statement_descriptor": null, "tax_code": null, "type": "service",
        "unit_label": optional(params, "unit_label"), "updated": now, "url": null,
    })
}

pub fn price(id: &str, now: i64, params: &Value) -> Value {
    let amount = crate::state::number(&params["unit_amount"]);
    let decimal = params.get("unit_amount_decimal").cloned();
    let recurring = &params["recurring"];
    json!({
        "id": id, "object": "price", "active": true, "billing_scheme": "per_unit", "created": now,
        "currency": params["currency"], "custom_unit_amount": null, "livemode": false,
        "lookup_key": optional(params, "lookup_key"), "metadata": metadata(params),
        "nickname": optional(params, "nickname"), "product": params["product"],
        "recurring": {
            "interval": recurring["interval"], "interval_count": 1, "meter": optional(recurring, "meter"),
            "trial_period_days": null,
            "usage_type": recurring.get("usage_type").cloned().unwrap_or_else(|| "licensed".into()),
        },
        "tax_behavior": "unspecified", "tiers_mode": null, "transform_quantity": null, "type": "recurring",
        "unit_amount": amount,
        "unit_amount_decimal": decimal.unwrap_or_else(|| amount.map_or(Value::Null, |it| it.to_string().into())),
    })
}

pub fn meter(id: &str, now: i64, params: &Value) -> Value {
    json!({
        "id": id, "object": "billing.meter", "created": now,
        "customer_mapping": {"event_payload_key": "stripe_customer_id", "type": "by_id"},
        "default_aggregation": {"formula": params["default_aggregation"]["formula"]},
        "display_name": params["display_name"], "event_name": params["event_name"], "event_time_window": null,
        "livemode": false, "status": "active", "status_transitions": {"deactivated_at": null}, "updated": now,
        "value_settings": {"event_payload_key": "value"},
    })
}

pub fn webhook_endpoint(id: &str, now: i64, params: &Value) -> Value {
    json!({
        "id": id, "object": "webhook_endpoint",
        "api_version": params.get("api_version").cloned().unwrap_or_else(|| API_VERSION.into()),
        "application": null, "created": now, "description": optional(params, "description"),
        "enabled_events": params["enabled_events"], "livemode": false, "metadata": metadata(params),
        "status": "enabled", "url": params["url"],
    })
}

pub fn session(id: &str, now: i64, base: &str, params: &Value) -> Value {
    json!({
        "id": id, "object": "checkout.session", "adaptive_pricing": {"enabled": false}, "after_expiration": null,
        "allow_promotion_codes": null, "amount_subtotal": 0, "amount_total": 0,
        "automatic_tax": {"enabled": false, "liability": null, "provider": null, "status": null},
        "billing_address_collection": null, "cancel_url": optional(params, "cancel_url"),
        "client_reference_id": optional(params, "client_reference_id"), "client_secret": null,
        "collected_information": null, "consent": null, "consent_collection": null, "created": now,
        "currency": "usd", "currency_conversion": null, "custom_fields": [],
        "custom_text": {
            "after_submit": null, "shipping_address": null, "submit": null, "terms_of_service_acceptance": null,
        },
        "customer": optional(params, "customer"), "customer_creation": null, "customer_details": null,
        "customer_email": null, "discounts": [],
        "expires_at": crate::state::number(&params["expires_at"]).unwrap_or(now + 86_400),
        "invoice": null, "invoice_creation": null, "livemode": false, "locale": null,
        "metadata": metadata(params), "mode": params["mode"], "origin_context": null, "payment_intent": null,
        "payment_link": null, "payment_method_collection": "always",
        "payment_method_configuration_details": null,
        "payment_method_options": {"card": {"request_three_d_secure": "automatic"}},
        "payment_method_types": ["card"], "payment_status": "unpaid", "permissions": null,
        "phone_number_collection": {"enabled": false}, "recovered_from": null,
        "saved_payment_method_options": null, "setup_intent": null, "shipping_address_collection": null,
        "shipping_cost": null, "shipping_options": [], "status": "open", "submit_type": null, "subscription": null,
        "success_url": optional(params, "success_url"), "total_details": null, "ui_mode": "hosted_page",
        "url": format!("{base}/pay/{id}"), "wallet_options": null,
        // Unlike a real session, this one contains the items and the data of the future subscription.
        "_line_items": params["line_items"], "_subscription_data": optional(params, "subscription_data"),
    })
}

pub fn portal_session(id: &str, now: i64, base: &str, params: &Value) -> Value {
    json!({
        "id": id, "object": "billing_portal.session", "configuration": "bpc_fake", "created": now,
        "customer": params["customer"], "customer_account": null, "flow": null, "livemode": false, "locale": null,
        "on_behalf_of": null, "return_url": optional(params, "return_url"), "url": format!("{base}/portal/{id}"),
    })
}

/// Returns the legacy description of a price, which subscription items still contain.
fn plan(price: &Value) -> Value {
    let recurring = &price["recurring"];
    json!({
        "id": price["id"], "object": "plan", "active": true, "amount": price["unit_amount"],
        "amount_decimal": price["unit_amount_decimal"], "billing_scheme": "per_unit", "created": price["created"],
        "currency": price["currency"], "interval": recurring["interval"], "interval_count": 1, "livemode": false,
        "metadata": price["metadata"], "meter": recurring["meter"], "nickname": price["nickname"],
        "product": price["product"], "tiers_mode": null, "transform_usage": null, "trial_period_days": null,
        "usage_type": recurring["usage_type"],
    })
}

pub fn item(id: &str, subscription: &str, (start, end): (i64, i64), price: &Value) -> Value {
    let mut item = json!({
        "id": id, "object": "subscription_item", "billing_thresholds": null, "created": start,
        "current_period_end": end, "current_period_start": start, "discounts": [], "metadata": {},
        "plan": plan(price), "price": price, "subscription": subscription, "tax_rates": [],
    });
    if price["recurring"]["usage_type"] != "metered" {
        item["quantity"] = 1.into();
    }
    item
}

pub fn subscription(id: &str, now: i64, customer: &str, items: &[Value], params: &Value) -> Value {
    let url = format!("/v1/subscription_items?subscription={id}");
    json!({
        "id": id, "object": "subscription", "application": null, "application_fee_percent": null,
        "automatic_tax": {"disabled_reason": null, "enabled": false, "liability": null},
        "billing_cycle_anchor": now, "billing_cycle_anchor_config": null,
        "billing_mode": {"flexible": {"proration_discounts": "included"}, "type": "flexible", "updated_at": null},
        "billing_schedules": [], "billing_thresholds": null, "cancel_at": null,
        "cancel_at_period_end": is_true(params, "cancel_at_period_end"), "canceled_at": null,
        "cancellation_details": {"comment": null, "feedback": null, "reason": null},
        "collection_method": "charge_automatically", "created": now, "currency": items[0]["price"]["currency"],
        "customer": customer, "days_until_due": null, "default_payment_method": null, "default_source": null,
        "default_tax_rates": [], "description": null, "discounts": [], "ended_at": null,
        "invoice_settings": {"account_tax_ids": null, "issuer": {"type": "self"}},
        "items": list(&url, items, false), "latest_invoice": null, "livemode": false,
        "metadata": metadata(params), "next_pending_invoice_item_invoice": null, "on_behalf_of": null,
        "pause_collection": null,
        "payment_settings": {
            "payment_method_options": null, "payment_method_types": null, "save_default_payment_method": "off",
        },
        "pending_invoice_item_interval": null, "pending_setup_intent": null, "pending_update": null,
        "schedule": null, "start_date": now, "status": "incomplete", "test_clock": null, "transfer_data": null,
        "trial_end": null,
        "trial_settings": {"end_behavior": {
            "missing_payment_method": params["trial_settings"]["end_behavior"]
                .get("missing_payment_method").cloned().unwrap_or_else(|| "create_invoice".into()),
        }},
        "trial_start": null,
    })
}

/// One line of an invoice.
pub struct Line<'a> {
    pub id: String,
    pub price: &'a Value,
    pub amount: i64,
    pub quantity: i64,
    pub period: (i64, i64),
}

pub fn line(line: &Line<'_>, invoice: &str) -> Value {
    json!({
        "id": line.id, "object": "line_item", "amount": line.amount, "currency": line.price["currency"],
        "description": line.price["nickname"], "discount_amounts": [], "discountable": true, "discounts": [],
        "invoice": invoice, "livemode": false, "metadata": {}, "parent": null,
        "period": {"start": line.period.0, "end": line.period.1}, "pretax_credit_amounts": [],
        "pricing": {
            "price_details": {"price": line.price["id"], "product": text(&line.price["product"])},
            "type": "price_details", "unit_amount_decimal": line.price["unit_amount_decimal"],
        },
        "quantity": line.quantity, "subtotal": line.amount, "taxes": [],
    })
}

pub fn invoice(
    id: &str,
    now: i64,
    base: &str,
    subscription: &Value,
    reason: &str,
    period: (i64, i64),
) -> Value {
    json!({
        "id": id, "object": "invoice", "account_country": "US", "account_name": "Fake", "account_tax_ids": null,
        "amount_due": 0, "amount_overpaid": 0, "amount_paid": 0, "amount_remaining": 0, "amount_shipping": 0,
        "application": null, "attempt_count": 0, "attempted": false, "auto_advance": true,
        "automatic_tax": {
            "disabled_reason": null, "enabled": false, "liability": null, "provider": null, "status": null,
        },
        "automatically_finalizes_at": null, "billing_reason": reason, "collection_method": "charge_automatically",
        "created": now, "currency": subscription["currency"], "custom_fields": null,
        "customer": subscription["customer"], "customer_address": null, "customer_email": null,
        "customer_name": null, "customer_phone": null, "customer_shipping": null, "customer_tax_exempt": "none",
        "customer_tax_ids": [], "default_payment_method": null, "default_source": null, "default_tax_rates": [],
        "description": null, "discounts": [], "due_date": null, "effective_at": null, "ending_balance": null,
        "footer": null, "from_invoice": null, "hosted_invoice_url": format!("{base}/invoice/{id}"),
        "invoice_pdf": null, "issuer": {"type": "self"}, "last_finalization_error": null, "latest_revision": null,
        "lines": list(&format!("/v1/invoices/{id}/lines"), &[], false), "livemode": false, "metadata": {},
        "next_payment_attempt": null, "number": null, "on_behalf_of": null,
        "parent": {
            "quote_details": null, "type": "subscription_details",
            "subscription_details": {"metadata": subscription["metadata"], "subscription": subscription["id"]},
        },
        "payment_settings": {
            "default_mandate": null, "payment_method_options": null, "payment_method_types": null,
        },
        "period_end": period.1, "period_start": period.0, "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0, "receipt_number": null, "rendering": null, "shipping_cost": null,
        "shipping_details": null, "starting_balance": 0, "statement_descriptor": null, "status": "draft",
        "status_transitions": {
            "finalized_at": null, "marked_uncollectible_at": null, "paid_at": null, "voided_at": null,
        },
        "subtotal": 0, "subtotal_excluding_tax": 0, "test_clock": null, "total": 0, "total_discount_amounts": [],
        "total_excluding_tax": 0, "total_pretax_credit_amounts": [], "total_taxes": [],
        "webhooks_delivered_at": null,
    })
}

/// Returns the object in the format of API versions before 2025-03-31: periods on the subscription, and the
/// subscription on the invoice.
pub fn as_of_2024(object: &Value) -> Value {
    let mut object = object.clone();
    match object["object"].as_str() {
        Some("subscription") => {
            for name in ["current_period_start", "current_period_end"] {
                object[name] = object["items"]["data"][0][name].clone();
                for item in object["items"]["data"].as_array_mut().into_iter().flatten() {
                    if let Some(item) = item.as_object_mut() {
                        item.remove(name);
                    }
                }
            }
        }
        Some("invoice") => {
            object["subscription"] =
                object["parent"]["subscription_details"]["subscription"].clone();
            if let Some(invoice) = object.as_object_mut() {
                invoice.remove("parent");
            }
        }
        _ => {}
    }
    object
}
