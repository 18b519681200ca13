//! The pages that customers see: Checkout and the customer portal.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    header::{CONTENT_TYPE, LOCATION},
};
use serde_json::Value;

use crate::state::{Card, State, text};

pub fn html(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "text/html; charset=utf-8");
    response
        .body(Full::new(Bytes::from(text)))
        .unwrap_or_default()
}

fn redirect(to: &str) -> Response<Full<Bytes>> {
    let response = Response::builder()
        .status(StatusCode::SEE_OTHER)
        .header(LOCATION, to);
    response.body(Full::default()).unwrap_or_default()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('"', "&quot;")
}

fn layout(title: &str, content: &str) -> String {
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
         <title>{title}</title><style>body{{font:16px system-ui;max-width:32rem;margin:3rem auto;padding:0 1rem}}\
         button{{font:inherit;margin:.25rem 0;padding:.5rem 1rem;display:block;width:100%}}</style>\
         <h1>{title}</h1><p>This page stands in for Stripe. No money moves.</p>{content}"
    )
}

fn buttons(action: &str, choices: &[(&str, &str)]) -> String {
    let buttons = choices
        .iter()
        .map(|(value, label)| format!("<button name=do value={value}>{label}</button>"));
    format!(
        "<form method=post action='{action}'>{}</form>",
        buttons.collect::<String>()
    )
}

fn price_line(state: &State, price: &Value) -> String {
    let Ok(price) = state.find("price", price.as_str().unwrap_or_default()) else {
        return String::new();
    };
    let cents = price["unit_amount"].as_i64().unwrap_or(0);
    let per = if price["recurring"]["usage_type"] == "metered" {
        "per unit used"
    } else {
        "per month"
    };
    format!(
        "<li>{}: {}.{:02} {} {per}</li>",
        escape(&text(&price["nickname"])),
        cents / 100,
        cents % 100,
        text(&price["currency"]).to_uppercase()
    )
}

/// Serves a page, or executes the action of a button on the page. Returns `None` if there is no such page.
pub fn answer(
    state: &mut State,
    method: &Method,
    path: &[&str],
    form: &Value,
) -> Option<Response<Full<Bytes>>> {
    let chosen = form["do"].as_str().filter(|_| method == Method::POST);
    match path {
        ["pay", id] => checkout(state, id, chosen),
        ["portal", id] => portal(state, id, chosen),
        _ => None,
    }
}

fn checkout(state: &mut State, id: &str, chosen: Option<&str>) -> Option<Response<Full<Bytes>>> {
    let session = state.find("checkout.session", id).ok()?.clone();
    let success = text(&session["success_url"]).replace("{CHECKOUT_SESSION_ID}", id);
    let result = match chosen {
        Some("pay") => state.complete_session(id, Card::Good, false),
        Some("later") => state.complete_session(id, Card::Good, true),
        Some("decline") => state.complete_session(id, Card::Declines, false),
        Some(_) => return Some(redirect(&text(&session["cancel_url"]))),
        None => {
            if session["status"] != "open" {
                let page = layout(
                    "Checkout",
                    "<p>This page has expired or was already used.</p>",
                );
                return Some(html(StatusCode::OK, page));
            }
            let items = session["_line_items"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let lines: String = items
                .iter()
                .map(|item| price_line(state, &item["price"]))
                .collect();
            let choices = [
                ("pay", "Pay with a working card"),
                ("later", "Pay by bank debit, which takes days"),
                ("decline", "Pay with a card that is declined"),
                ("cancel", "Go back without paying"),
            ];
            let page = format!(
                "<ul>{lines}</ul>{}",
                buttons(&format!("/pay/{id}"), &choices)
            );
            return Some(html(StatusCode::OK, layout("Checkout", &page)));
        }
    };
    Some(match result {
        Ok(_) => redirect(&success),
        Err(failure) => {
            let message = escape(&text(&failure.body["error"]["message"]));
            let page = format!(
                "<p><strong>{message}</strong></p><p><a href='/pay/{id}'>Try again</a></p>"
            );
            html(StatusCode::PAYMENT_REQUIRED, layout("Checkout", &page))
        }
    })
}

fn portal(state: &mut State, id: &str, chosen: Option<&str>) -> Option<Response<Full<Bytes>>> {
    let session = state.find("billing_portal.session", id).ok()?.clone();
    let customer = text(&session["customer"]);
    let of_customer = |it: &&Value| it["customer"] == customer.as_str();
    let subscriptions = state.all("subscription").iter().filter(of_customer);
    let subscription = subscriptions.map(|it| text(&it["id"])).next_back();
    let open = |state: &State| -> Vec<String> {
        let invoices = state.all("invoice").iter().filter(of_customer);
        invoices
            .filter(|it| it["status"] == "open")
            .map(|it| text(&it["id"]))
            .collect()
    };
    match (chosen, &subscription) {
        (Some("good"), _) => {
            state.cards.insert(customer.clone(), Card::Good);
            for invoice in open(state) {
                state.collect(&invoice);
            }
        }
        (Some("bad"), _) => {
            state.cards.insert(customer.clone(), Card::Declines);
        }
        (Some("end"), Some(id)) => cancel_at_period_end(state, id, true),
        (Some("keep"), Some(id)) => cancel_at_period_end(state, id, false),
        (Some("cancel"), Some(id)) => state.cancel(id, "cancellation_requested"),
        (Some("month"), _) => state.advance(31 * 86_400),
        (Some("back"), _) => return Some(redirect(&text(&session["return_url"]))),
        _ => {}
    }
    if chosen.is_some() {
        return Some(redirect(&format!("/portal/{id}")));
    }
    let status = subscription.and_then(|id| state.find("subscription", &id).ok().cloned());
    let status = status.map_or_else(|| "none".to_owned(), |it| text(&it["status"]));
    let choices = [
        ("good", "Use a working card, and pay open invoices"),
        ("bad", "Use a card that is declined"),
        ("end", "Cancel at the end of the period"),
        ("keep", "Don't cancel"),
        ("cancel", "Cancel now"),
        ("month", "Let a month pass"),
        ("back", "Return"),
    ];
    let page = format!(
        "<p>Subscription: {status}. Open invoices: {}.</p>{}",
        open(state).len(),
        buttons(&format!("/portal/{id}"), &choices)
    );
    Some(html(StatusCode::OK, layout("Customer portal", &page)))
}

fn cancel_at_period_end(state: &mut State, id: &str, on: bool) {
    let end = state
        .find("subscription", id)
        .map(|it| it["items"]["data"][0]["current_period_end"].clone());
    let end = end.unwrap_or_default();
    let fields = serde_json::json!({
        "cancel_at_period_end": on, "cancel_at": if on { end } else { Value::Null },
    });
    let updated = state.set("subscription", id, &fields);
    state.emit("customer.subscription.updated", &updated);
}
