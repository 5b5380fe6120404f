names=(Alice Bob)
actions=(Purchase Sell)
for ((line = 0; line <= 400; line++)); do
  echo "${names[RANDOM % 2]} | ${actions[RANDOM % 2]} | $((RANDOM % 100)) | $((RANDOM % 1000))"
done >> /usr/stock.log
